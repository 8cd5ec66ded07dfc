// The participant's commands by RabbitMQ: a queue of the channel's name, acked when the replies are confirmed.
import amqp from "amqplib";

export async function serve(url, channelName, contentType, receive) {
  const connection = await amqp.connect(url);
  const channel = await connection.createConfirmChannel();
  connection.on("close", () => process.exit(1)); // whoever keeps the process starts it again
  channel.on("return", () => process.exit(1)); // nobody takes our replies: the commands come again
  const send = (name, _key, body) => new Promise((resolve, reject) => channel.sendToQueue(name, body,
    { persistent: true, mandatory: true, contentType }, (error) => (error ? reject(error) : resolve())));
  await channel.prefetch(32);
  await channel.consume(channelName, async (message) => {
    await receive(message.content, send);
    channel.ack(message);
  });
}
