// A participant in Node: it books parcels, and takes them back. What it keeps is docs/wire.md, "What a participant must
// keep", and the numbers of rules here are those of that page. RabbitMQ or Kafka brings the commands; PostgreSQL has the
// effects. Environment: DATABASE_URL, BROKER_URL (amqp:// or kafka://host:port), SAGA_NAMESPACE.
import { randomUUID } from "node:crypto";
import pg from "pg";

const NAMESPACE = process.env.SAGA_NAMESPACE ?? "default";
const COMMANDS = `saga.${NAMESPACE}.commands.parcels`;
const TYPE = "application/cloudevents+json; charset=utf-8";
const db = new pg.Pool({ connectionString: process.env.DATABASE_URL });
const running = new Map();
class Refused extends Error {}

const activities = {
  ship: {
    async forward(sql, order) {
      if (order.grams > 30_000) throw new Refused("too_heavy");
      await sql.query("INSERT INTO parcel (id, address) VALUES ($1, $2)", [order.id, order.address]);
      return { parcel: order.id };
    },
    async compensate(sql, output) {
      await sql.query("UPDATE parcel SET cancelled = true WHERE id = $1", [output.parcel]);
    },
  },
};

const keyOf = (command, direction, iteration = command.iteration, round = command.round) =>
  JSON.stringify([command.namespace, command.saga, command.runid, command.step, iteration, round, direction]);
const meant = (command) => keyOf(command, "forward", command.forwarditeration, command.forwardround);

async function insert(sql, key, outcome, data = null) {
  const done = await sql.query(
    "INSERT INTO barrier (key, outcome, data) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
    [key, outcome, JSON.stringify(data)]);
  return done.rowCount === 1; // rule 1: judged by the number of rows, not by an error
}

async function find(sql, key) {
  const { rows } = await sql.query("SELECT outcome, data FROM barrier WHERE key = $1", [key]);
  return rows[0];
}

async function transaction(work) {
  const sql = await db.connect();
  try {
    await sql.query("BEGIN");
    const result = await work(sql);
    await sql.query("COMMIT");
    sql.release();
    return result;
  } catch (error) {
    await sql.query("ROLLBACK").catch(() => {});
    sql.release(true);
    throw error;
  }
}

const cancelled = { outcome: "refused", data: { code: "cancelled", details: null } };
const nothing = { outcome: "nothing_to_undo", data: null };
const stored = (row) => (row.outcome === "cancelled" ? cancelled : row); // rule 5

async function forward(command) {
  const key = keyOf(command, "forward");
  const known = await find(db, key); // rule 2
  if (known) return stored(known);
  try {
    return await transaction(async (sql) => {
      const data = { output: await activities[command.activity].forward(sql, command.data), undo: null };
      if (!(await insert(sql, key, "done", data))) throw new Error("another copy was first");
      return { outcome: "done", data };
    });
  } catch (error) {
    const row = await find(db, key);
    if (row) return stored(row);
    if (!(error instanceof Refused))
      return { outcome: "failed", data: { error: error.code ?? error.name, retryable: true, retry_after_ms: null } };
    const data = { code: error.message, details: null };
    if (command.final && !(await insert(db, key, "refused", data))) return stored(await find(db, key)); // rule 7
    return { outcome: "refused", data };
  }
}

const compensate = (command) => transaction(async (sql) => {
  if (await insert(sql, meant(command), "cancelled")) return nothing; // rule 4
  const action = await find(sql, meant(command));
  if (action.outcome !== "done") return nothing;
  const key = keyOf(command, "compensate");
  if (!(await insert(sql, key, "done"))) return stored(await find(sql, key));
  await activities[command.activity].compensate(sql, action.data.output); // rule 6
  return { outcome: "done", data: null };
});

async function fence(command, key) { // rule 8
  if (await insert(db, key, "cancelled")) return nothing;
  const row = await find(db, key);
  return row.outcome === "done" ? { outcome: "had_run", data: row.data } : nothing;
}

const directions = {
  forward,
  compensate,
  fence: (command) => fence(command, meant(command)),
  close: (command) => fence(command, keyOf(command, "compensate", command.forwarditeration, command.forwardround)),
};

async function answer(command, received) {
  if (command.remainingms !== undefined && Date.now() - received >= command.remainingms)
    return { outcome: "failed", data: { error: "deadline", retryable: true, retry_after_ms: null } }; // rule 9
  if (!running.has(command.commandid)) // rule 12
    running.set(command.commandid, directions[command.direction](command).finally(() => running.delete(command.commandid)));
  return running.get(command.commandid).catch((error) =>
    ({ outcome: "failed", data: { error: error.code ?? error.name, retryable: true, retry_after_ms: null } }));
}

const REPEATED = ["namespace", "saga", "sagaid", "runid", "step", "iteration", "round", "direction", "commandid", "attempt",
  "schemaversion", "traceparent"];

function reply(command, { outcome, data }) {
  const said = Object.fromEntries(REPEATED.filter((name) => name in command).map((name) => [name, command[name]]));
  return { specversion: "1.0", type: "saga.reply.v1", source: `/saga/${NAMESPACE}/participant`, id: randomUUID(),
    subject: command.sagaid, datacontenttype: "application/json", ...said, outcome, data };
}

function envelopes(body) {
  try { return [].concat(JSON.parse(body)); } catch { return [body]; }
}

function isOurs(command) {
  return command?.specversion === "1.0" && command.type === "saga.command.v1" && command.namespace === NAMESPACE
    && command.replyto === `saga.${NAMESPACE}.replies` && command.direction in directions && command.activity in activities;
}

await db.query(`CREATE TABLE IF NOT EXISTS barrier (key text PRIMARY KEY, outcome text NOT NULL, data jsonb);
  CREATE TABLE IF NOT EXISTS parcel (id text PRIMARY KEY, address text NOT NULL, cancelled boolean DEFAULT false)`);
const { serve } = await import(process.env.BROKER_URL.startsWith("kafka:") ? "./kafka.js" : "./rabbitmq.js");
await serve(process.env.BROKER_URL, COMMANDS, TYPE, async (body, send) => {
  const received = Date.now();
  for (const command of envelopes(body))
    if (isOurs(command)) // rule 3: whoever brought the command forgets it after this, when the reply is confirmed
      await send(command.replyto, command.runid, Buffer.from(JSON.stringify(reply(command, await answer(command, received)))));
    else await send(`${COMMANDS}.parked`, "", Buffer.isBuffer(command) ? command : Buffer.from(JSON.stringify(command)));
});
console.log("participant is up");
