// Replicas, reward workers and queues, as they were when the trainer last looked.

import { ask } from "./api.js";
import { duration, element, say } from "./dom.js";
import { part } from "./part.js";

const STREAMS = {
  prompts: "asked, not yet answered",
  rollouts: "answered, not yet scored",
  "scored:train": "scored; a checkpoint lets them go",
  "scored:eval": "scored for an evaluation",
  retries: "given up once, to be asked again",
  dead: "given up: mars dead list says why",
};

export function servicesView() {
  const head = element("h1"), ago = element("p", { class: "count" }), problem = element("p", { class: "conflict" });
  const replicas = table("Replicas", ["name", "policy", "behind, steps", "groups in hand", "last heard of", "restarts", "software"], 4);
  const workers = table("Reward workers", ["name", "groups in hand", "last heard of", "restarts", "software"], 2);
  const queues = table("Queues", ["stream", "groups", "in hand", "oldest", "what is in it"], 3);
  const deaths = table("Given up", ["group", "prompt", "reason"]);
  return {
    node: element("section", {}, head, ago, problem, ...[replicas, workers, queues, deaths].map((each) => each.node)),
    async refresh() {
      const status = await ask("/v1/status");
      say(head, inShort(status));
      say(ago, seen(status));
      say(problem, problemOf(status));
      replicas.show(rows(status, "rollout", replica));
      workers.show(rows(status, "reward", worker));
      queues.show(status.state && Object.entries(status.state.queues).map(queue));
      deaths.show(status.deaths.length ? status.deaths.map(death) : null);
    },
  };
}

// Where a run is, in a few words.
export function inShort(status) {
  const { state } = status;
  if (status.finished) return `${status.name}: finished`;
  if (status.said_s === null) return `${status.name}: nothing heard of it yet`;
  const place = state === null ? "" : `step ${state.step} of ${state.steps}, `;
  if (status.stopped) return `${status.name}: ${place}stopped`;
  const doing = status.alive ? state?.state ?? "at work" : `silent for ${duration(status.said_s)}`;
  return `${status.name}: ${place}${doing}`;
}

function seen(status) {
  const restarts = `restarts of the trainer: ${status.restarts}`;
  if (status.state === null) return restarts;
  return `policy ${status.state.version}; as the trainer saw it ${duration(status.state_s)} ago; ${restarts}`;
}

function problemOf(status) {
  if (status.state_problem !== null) return `Replicas and queues cannot be shown: ${status.state_problem}.`;
  if (status.state === null) return "Replicas and queues are not known: the trainer has written down nothing of them.";
  return status.state.redis ? "" : "Redis did not answer.";
}

function rows(status, service, cells) {
  return status.state && status.state.services.filter((one) => one.service === service).map((one) => cells(one, `${duration(one.seen_s + status.state_s)} ago`));
}

function replica(one, heard) {
  return [one.name, one.version ?? "none yet", one.lag ?? "–", one.in_hand, heard, one.starts - 1, software(one)];
}

function worker(one, heard) {
  return [one.name, one.in_hand, heard, one.starts - 1, software(one)];
}

function queue([name, one]) {
  return [name, one.entries, one.claimed, one.entries ? duration(one.oldest_s) : "–", STREAMS[name] ?? ""];
}

function death(one) {
  return [one.task_id ?? "", one.prompt_id ?? "", one.reason];
}

function software(one) {
  return Object.entries(one.software).map(([name, version]) => `${name} ${version}`).join(", ");
}

// A table whose column of ages changes all the time: these are put in where they stand, and the rest is left as it is. Without rows
// (null) there is no table.
function table(title, heads, aged = null) {
  const { node, show } = part("div", { class: "wide" });
  return {
    node,
    show(rows) {
      const lasting = rows && rows.map((cells) => cells.filter((_, index) => index !== aged));
      show(lasting, () => (rows ? [drawn(title, heads, rows, aged)] : []));
      node.querySelectorAll(".aged").forEach((cell, index) => say(cell, rows[index][aged]));
    },
  };
}

function drawn(title, heads, rows, aged) {
  const body = rows.length ? rows : [["none", ...heads.slice(1).map(() => "")]];
  const cell = (value, index) => (index === 0
    ? element("th", { scope: "row" }, String(value))
    : element("td", { class: rows.length && index === aged ? "aged" : null }, String(value)));
  return element("table", { "data-table": title },
    element("caption", {}, title),
    element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head)))),
    element("tbody", {}, ...body.map((cells) => element("tr", {}, ...cells.map(cell)))));
}
