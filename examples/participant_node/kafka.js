// The participant's commands by Kafka: a topic and a group of the channel's name, its offsets committed after the replies.
import { Kafka, Partitioners, logLevel } from "kafkajs";

export async function serve(url, channelName, contentType, receive) {
  const kafka = new Kafka({ brokers: url.replace("kafka://", "").split(","), logLevel: logLevel.NOTHING });
  const producer = kafka.producer({ createPartitioner: Partitioners.DefaultPartitioner, allowAutoTopicCreation: false });
  const consumer = kafka.consumer({ groupId: channelName, sessionTimeout: 6000, heartbeatInterval: 1200,
    allowAutoTopicCreation: false });
  const send = (topic, key, value) => producer.send(
    { topic, acks: -1, messages: [{ key, value, headers: { "content-type": contentType } }] });
  const joined = new Promise((resolve) => consumer.on(consumer.events.GROUP_JOIN, resolve));
  consumer.on(consumer.events.CRASH, () => process.exit(1)); // whoever keeps the process starts it again
  await Promise.all([producer.connect(), consumer.connect()]);
  await consumer.subscribe({ topic: channelName, fromBeginning: true });
  await consumer.run({
    partitionsConsumedConcurrently: 8,
    eachMessage: ({ message }) => receive(message.value, send),
  });
  await joined;
}
