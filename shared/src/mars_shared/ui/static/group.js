// One group: all sources beside each other, what was answered from each, and what came of it.

import { ask } from "./api.js";
import { element, modelText, number, signed, svg } from "./dom.js";
import { filtersOf, linkTo } from "./groups.js";

export function groupView(parameters) {
  const node = element("section", {});
  const wanted = filtersOf(parameters);
  let answer = null;
  return {
    node,
    async refresh() {
      if (answer !== null) return;
      answer = await ask("/v1/group", { ...wanted, name: parameters.name });
      node.replaceChildren(...shown(answer, wanted));
    },
    key(event) {
      if (answer === null) return;
      const to = { ArrowRight: answer.next, j: answer.next, ArrowLeft: answer.previous, k: answer.previous }[event.key];
      if (to) location.hash = linkTo("/group", { ...wanted, name: to });
    },
  };
}

function shown(answer, wanted) {
  const { group } = answer;
  return [
    steps(answer, wanted),
    element("h1", {}, group.prompt_id),
    element("p", { class: "question" }, modelText(group.question)),
    element("p", {}, truthOf(group)),
    element("div", { class: "sources" }, ...group.sources.map((source) => sourceFigure(answer.name, group, source))),
    statistics(group),
    ...answers(group),
    element("p", { class: "made" }, `policy ${group.policy_version.incarnation}.${group.policy_version.step}, ${group.replica}, generated in ${number(group.generation_s, 2)} s, scored in ${number(group.reward_s, 2)} s; ${group.task_id}`),
  ];
}

function steps(answer, wanted) {
  const link = (name, text) => (name ? element("a", { href: linkTo("/group", { ...wanted, name }) }, text) : element("span", {}, text));
  const place = answer.place === null ? "not among the filtered groups" : `${answer.place + 1} of ${answer.total}`;
  return element("nav", { class: "steps", "aria-label": "Groups" },
    link(answer.previous, "← newer"), element("a", { href: linkTo("/groups", wanted) }, place), link(answer.next, "older →"));
}

function truthOf(group) {
  if (group.truth === null) return "No ground truth.";
  if (group.truth.kind === "text") return element("span", {}, "Right answer: ", modelText(group.truth.text, { class: "truth-text" }));
  const { length } = group.truth.boxes;
  return `${length} true ${length === 1 ? "box" : "boxes"}, drawn in green; boxes of answers have the colour of the bar beside their answer; point at an answer to see its own.`;
}

function answersOf(group, source) {
  return group.answers.filter((answer) => answer.source === source);
}

// Multi-source boxes are drawn in every image, those of a source alone in its own.
function sourceFigure(name, group, source) {
  const image = element("img", { src: `/v1/image?${new URLSearchParams({ group: name, source: source.name })}`, alt: `source ${source.name}` });
  const frame = element("div", { class: "frame" }, image);
  if (group.truth !== null && group.truth.kind === "boxes") {
    const { width_px: width, height_px: height, boxes } = group.truth;
    frame.append(svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": `boxes in ${source.name}` },
      ...boxes.map((box) => rectangle(box, "truth", "true box")),
      ...answersOf(group, null).flatMap((answer) => answer.boxes.map((box) => rectangle(box, "multi", `multi-source answer ${answer.index}`, answer))),
      ...answersOf(group, source.name).flatMap((answer) => answer.boxes.map((box) => rectangle(box, "mono", `answer ${answer.index} from ${source.name} alone`, answer)))));
  }
  const alone = answersOf(group, source.name);
  const mean = alone.length ? alone.reduce((sum, answer) => sum + answer.reward, 0) / alone.length : null;
  return element("figure", { class: "source", "data-source": source.name }, frame,
    element("figcaption", {}, source.name, mean === null ? "" : `: alone ${number(mean)}`,
      source.name in group.gain_by_source ? `, gain ${signed(group.gain_by_source[source.name])}` : ""));
}

// What tells an answer's boxes from those of others.
function markOf(answer) {
  return `${answer.source ?? ""}/${answer.index}`;
}

// Boxes of other answers step back while the pointer is on an answer.
function pointTo(answer, on) {
  for (const sources of document.querySelectorAll(".sources")) {
    sources.classList.toggle("pointed", on && answer.boxes.length > 0);
    for (const box of sources.querySelectorAll("rect")) box.classList.toggle("pointed", box.dataset.answer === markOf(answer));
  }
}

function rectangle([left, top, right, bottom], kind, title, answer = null) {
  return svg("rect", { "data-answer": answer === null ? null : markOf(answer), x: left, y: top, width: right - left, height: bottom - top, class: kind, "vector-effect": "non-scaling-stroke" }, svg("title", {}, title));
}

function statistics(group) {
  const multi = answersOf(group, null).length, all = group.answers.length;
  const facts = [["gain", group.gain === null ? "–" : signed(group.gain)]];
  if (group.statistics !== null) {
    facts.push(["μ", number(group.statistics.pool_mean)], ["σ", number(group.statistics.pool_std)], ["λ = G / N", `${multi} / ${all} = ${number(multi / all, 2)}`]);
    facts.push(["signal", group.statistics.signal ? "yes" : "none"], ["trained", group.statistics.trained ? "yes" : "left out"]);
  }
  return element("dl", { class: "statistics" }, ...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

function answers(group) {
  const parts = [["All sources together", null], ...group.sources.map((source) => [`${source.name} alone`, source.name])];
  return parts
    .map(([title, source]) => [title, answersOf(group, source)])
    .filter(([, found]) => found.length)
    .map(([title, found]) => element("section", { class: "answers" }, element("h2", {}, title), ...found.map((answer) => answerCard(group, answer))));
}

function answerCard(group, answer) {
  const { think, rest } = divided(answer.text);
  const pointing = { onpointerenter: () => pointTo(answer, true), onpointerleave: () => pointTo(answer, false) };
  return element("article", { class: "answer", "data-kind": answer.kind, "data-source": answer.source ?? "", ...pointing },
    element("header", {},
      element("strong", {}, number(answer.reward)),
      ...Object.entries(answer.parts).map(([name, value]) => element("span", { class: "part" }, `${name} ${number(value, 2)}`)),
      answer.parsed ? null : element("span", { class: "part conflict" }, "not readable"),
      answer.finish_reason === "length" ? element("span", { class: "part conflict" }, "cut off") : null,
      element("span", { class: "part" }, `${answer.tokens} tokens`),
      answer.advantage === null ? null : bar(group, answer.advantage)),
    think === null ? null : element("p", { class: "think" }, element("span", { class: "tag" }, "think"), modelText(think)),
    element("p", { class: "said" }, modelText(rest)));
}

// The model's thoughts and what it answers, without the tags between them.
function divided(text) {
  const found = /^\s*<think>([\s\S]*?)<\/think>([\s\S]*)$/.exec(text);
  const rest = found ? found[2] : text;
  const answer = /^\s*<answer>([\s\S]*?)<\/answer>\s*$/.exec(rest);
  return { think: found ? found[1].trim() : null, rest: (answer ? answer[1] : rest).trim() };
}

// An advantage as a bar to the right (above the pool's mean) or to the left of the middle.
function bar(group, advantage) {
  const largest = Math.max(...group.answers.map((answer) => Math.abs(answer.advantage ?? 0)), 1e-9);
  const width = (50 * Math.abs(advantage)) / largest;
  return element("span", { class: "advantage", title: "advantage: (reward − μ) / σ" },
    svg("svg", { viewBox: "0 0 100 10", role: "img", "aria-label": `advantage ${signed(advantage, 2)}`, preserveAspectRatio: "none" },
      svg("rect", { x: advantage < 0 ? 50 - width : 50, y: 1, width, height: 8, class: advantage < 0 ? "down" : "up" }),
      svg("line", { x1: 50, x2: 50, y1: 0, y2: 10, class: "zero", "vector-effect": "non-scaling-stroke" })),
    element("span", {}, signed(advantage, 2)));
}
