// The list of groups, with filters that are part of the address.

import { ask } from "./api.js";
import { element, number, signed } from "./dom.js";
import { part } from "./part.js";

const PAGE = 50;
export const FILTERS = ["occasion", "outcome", "dataset", "source", "losing_to", "min_reward", "max_reward", "min_step", "max_step"];
const OUTCOMES = { conflict: "conflict: gain below 0", promotion: "promotion: gain above 0", no_signal: "no signal" };

export function filtersOf(parameters) {
  return Object.fromEntries(FILTERS.filter((name) => parameters[name]).map((name) => [name, parameters[name]]));
}

export function linkTo(path, parameters) {
  const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value !== "" && value !== null && value !== undefined));
  return query.size ? `#${path}?${query}` : `#${path}`;
}

export function groupsView(parameters) {
  const wanted = filtersOf(parameters), offset = Number(parameters.offset ?? 0);
  const filters = filterForm(wanted);
  const list = part("div", { class: "wide" });
  return {
    node: element("section", {}, element("h1", {}, "Groups"), filters.node, list.node),
    async refresh() {
      const answer = await ask("/v1/groups", { ...wanted, offset, limit: PAGE });
      filters.show(answer.choices);
      list.show(answer, () => listed(answer, wanted, offset));
    },
  };
}

// Fields stay where they are; choices are put into them when datasets or sources turn up.
function filterForm(wanted) {
  const changed = (event) => {
    const filled = Object.fromEntries([...new FormData(event.target.form).entries()].filter(([, value]) => value !== ""));
    location.hash = linkTo("/groups", filled);
  };
  const select = (name, label, choices) => ({ label, choices, name, field: part("select", { name, onchange: changed }) });
  const range = (name, label, step, inFull) => element("label", {}, label, element("input", { name, type: "number", step, value: wanted[name], "aria-label": inFull, onchange: changed }));
  const same = (names) => names.map((name) => [name, name]);
  const selects = [
    select("occasion", "from", () => [["step", "training"], ["evaluation", "evaluation"]]),
    select("outcome", "outcome", () => Object.entries(OUTCOMES)),
    select("dataset", "dataset", ({ datasets }) => same(datasets)),
    select("source", "with source", ({ sources }) => same(sources)),
    select("losing_to", "losing to", ({ sources }) => same(sources)),
  ];
  const node = element("form", { class: "filters", "aria-label": "Filters" },
    ...selects.map(({ label, field }) => element("label", {}, label, field.node)),
    range("min_reward", "reward from", "any", "reward from"),
    range("max_reward", "to", "any", "reward to"),
    range("min_step", "step from", "1", "step from"),
    range("max_step", "to", "1", "step to"),
    element("a", { href: "#/groups" }, "all groups"));
  return {
    node,
    show(known) {
      for (const { name, field, choices } of selects) field.show(choices(known), () => options(choices(known), wanted[name]));
    },
  };
}

function options(choices, chosen) {
  return [["", "any"], ...choices].map(([value, text]) => element("option", { value, selected: chosen === value }, text));
}

function listed(answer, wanted, offset) {
  const heads = [["step"], ["prompt"], ["sources", "less"], ["reward", "value"], ["gain", "value"], ["loses to"], ["signal", "less"]];
  const rows = answer.groups.map((facts) => element("tr", { "data-name": facts.name },
    element("td", { class: "step" }, facts.occasion === "evaluation" ? `${facts.step} eval` : String(facts.step)),
    element("th", { scope: "row" }, element("a", { href: linkTo("/group", { ...wanted, name: facts.name }) }, facts.prompt_id)),
    element("td", { class: "less" }, facts.sources.join(", ")),
    element("td", { class: "value" }, number(facts.reward)),
    element("td", { class: `value ${facts.gain < 0 ? "conflict" : facts.gain > 0 ? "promotion" : ""}` }, facts.gain === null ? "–" : signed(facts.gain)),
    element("td", {}, facts.losing_to.join(", ")),
    element("td", { class: "less" }, { true: "yes", false: "none" }[facts.signal] ?? "–")));
  const from = answer.total ? offset + 1 : 0, to = offset + answer.groups.length;
  return [
    element("p", { class: "count" }, `${from} to ${to} of ${answer.total} groups (${answer.recorded} recorded), newest first`),
    answer.unreadable ? element("p", { class: "conflict" }, unreadable(answer.unreadable)) : null,
    element("table", {}, element("thead", {}, element("tr", {}, ...heads.map(([head, kind]) => element("th", { scope: "col", class: kind }, head)))), element("tbody", {}, ...rows)),
    element("p", { class: "pages" },
      offset > 0 ? element("a", { href: linkTo("/groups", { ...wanted, offset: Math.max(0, offset - PAGE) || "" }) }, "newer") : null,
      to < answer.total ? element("a", { href: linkTo("/groups", { ...wanted, offset: offset + PAGE }) }, "older") : null),
  ];
}

// Torn by a killed writer, damaged, or of another version of mars.
function unreadable(count) {
  return `${count} ${count === 1 ? "record" : "records"} of groups could not be read`;
}
