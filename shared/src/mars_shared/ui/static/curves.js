// Curves over steps as SVG, and the table of evaluations.

import { ask } from "./api.js";
import { element, number, say, svg } from "./dom.js";
import { part } from "./part.js";

const CHARTS = [
  ["Reward of multi-source answers", [["metrics", "reward"], ["metrics", "reward_std"]]],
  ["Gain: multi-source minus mono-source reward", [["metrics", "gain"], ["metrics", "multi_minus_union"]]],
  ["Share of groups", [["metrics", "conflict_rate"], ["metrics", "promotion_rate"], ["metrics", "no_signal_rate"]]],
  ["KL and entropy, nats a token", [["metrics", "kl"], ["metrics", "entropy"]]],
  ["Gradient norm", [["metrics", "grad_norm"]]],
  ["Clipped tokens", [["metrics", "clip_ratio/low"], ["metrics", "clip_ratio/high"], ["metrics", "clip_ratio/dual"]]],
  ["Completion length, tokens", [["metrics", "completions/mean_length"], ["metrics", "completions/median_length"]]],
  ["Staleness of tokens, steps", [["metrics", "staleness/mean"], ["metrics", "staleness/max"]]],
  ["Share of time in which devices were busy", [["metrics", "efficiency"]]],
  ["Seconds a step, by stage", [["seconds", "training"], ["seconds", "weight_push"], ["seconds", "generation"], ["seconds", "reward"], ["seconds", "waiting"]]],
];
const WIDTH = 480, HEIGHT = 220, LEFT = 66, RIGHT = 10, TOP = 12, BOTTOM = 30;

export function curvesView() {
  const head = element("h1"), evaluated = part("div", { class: "wide" }), drawn = part("div", { class: "charts" });
  return {
    node: element("section", {}, head, evaluated.node, drawn.node),
    async refresh() {
      const [curves, evaluations] = await Promise.all([ask("/v1/curves"), ask("/v1/evaluations")]);
      say(head, curves.steps.length ? `Step ${curves.steps.at(-1)}` : "No step yet");
      evaluated.show(evaluations, () => [evaluationTable(evaluations)]);
      drawn.show(curves, () => charts(curves));
    },
  };
}

function charts(curves) {
  const bySource = Object.keys(curves.metrics).filter((name) => name.startsWith("gain/")).map((name) => ["metrics", name]);
  const wanted = bySource.length ? [...CHARTS.slice(0, 2), ["Gain over each source alone", bySource], ...CHARTS.slice(2)] : CHARTS;
  return wanted
    .map(([title, names]) => [title, names.filter(([field, name]) => curves[field][name])])
    .filter(([, names]) => names.length)
    .map(([title, names]) => chart(title, curves.steps, names.map(([field, name]) => [name, curves[field][name]])));
}

function chart(title, steps, lines) {
  const values = lines.flatMap(([, points]) => points.filter((value) => value !== null));
  const [low, high] = padded(Math.min(0, ...values), Math.max(...values, 0));
  const first = steps[0], last = Math.max(steps.at(-1), first + 1);
  const x = (step) => LEFT + ((step - first) / (last - first)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => TOP + ((high - value) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const readout = element("p", { class: "readout", "aria-hidden": true }, "\u00a0");
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": described(title, steps, lines) },
    ...ticks(low, high).flatMap((value) => [
      svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value), class: value === 0 ? "zero" : "grid" }),
      svg("text", { x: LEFT - 6, y: y(value) + 5, "text-anchor": "end" }, number(value, digits(high - low))),
    ]),
    svg("text", { x: LEFT, y: HEIGHT - 6 }, String(first)),
    svg("text", { x: WIDTH - RIGHT, y: HEIGHT - 6, "text-anchor": "end" }, `step ${steps.at(-1)}`),
    ...lines.map(([name, points], index) => svg("path", { d: path(steps, points, x, y), class: `line c${index}`, "data-name": name, "data-points": points.filter((value) => value !== null).length })));
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    const step = first + (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * (last - first);
    const nearest = steps.reduce((best, each, index) => (Math.abs(each - step) < Math.abs(steps[best] - step) ? index : best), 0);
    say(readout, `step ${steps[nearest]}: ${lines.map(([name, points]) => `${name} ${number(points[nearest])}`).join(", ")}`);
  });
  const legend = element("ul", { class: "legend" }, ...lines.map(([name], index) => element("li", { class: `c${index}` }, name)));
  return element("figure", { class: "chart" }, element("figcaption", {}, title), drawing, legend, readout);
}

// A point without neighbours is a line of no length, which its round ends make a dot.
function path(steps, points, x, y) {
  const known = (index) => points[index] !== null && points[index] !== undefined;
  return points.map((value, index) => {
    if (value === null) return "";
    const alone = !known(index - 1) && !known(index + 1);
    return `${known(index - 1) ? "L" : "M"}${x(steps[index]).toFixed(1)} ${y(value).toFixed(1)}${alone ? "h.1" : ""}`;
  }).join("");
}

function padded(low, high) {
  const room = (high - low || 1) * 0.05;
  return [low === 0 ? 0 : low - room, high + room];
}

function ticks(low, high) {
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let value = Math.ceil(low / step); value * step <= high; value += 1) found.push(value * step);
  return found;
}

function digits(range) {
  return Math.max(0, Math.min(6, 2 - Math.floor(Math.log10(range))));
}

function described(title, steps, lines) {
  const last = lines.map(([name, points]) => `${name} ${number(points.at(-1))}`).join(", ");
  return `${title}, steps ${steps[0]} to ${steps.at(-1)}; at the end ${last}`;
}

function evaluationTable(evaluations) {
  if (!evaluations.length) return element("p", {}, "No evaluation yet.");
  const sources = Object.keys(evaluations[0].mono);
  const heads = ["step", "Multi", ...sources.map((name) => `Mono ${name}`), "Union", "Multi − Union", "samples"];
  const kinds = heads.map((head) => (head === "samples" ? "value less" : "value"));
  const rows = evaluations.map((each) => [each.step, number(each.multi), ...sources.map((name) => number(each.mono[name])), number(each.union), number(each.multi_minus_union), each.samples]);
  return element("table", {},
    element("caption", {}, "Held-out samples: accuracy, or mean IoU of boxes"),
    element("thead", {}, element("tr", {}, ...heads.map((head, index) => element("th", { scope: "col", class: kinds[index] }, head)))),
    element("tbody", {}, ...rows.map((cells) => element("tr", {}, ...cells.map((cell, index) => element("td", { class: kinds[index] }, String(cell)))))));
}
