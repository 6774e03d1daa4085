// Elements from data. Text goes in as text and never as markup, and what would hide or reorder it is made visible.

const SVG = "http://www.w3.org/2000/svg";
const READ_OUT = ["alt", "aria-label", "title"];

export function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

export function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : READ_OUT.includes(key) ? visible(value) : value);
  }
  node.append(...content(children));
  return node;
}

// What an element holds: text made visible, elements as they are, nothing for null.
export function content(children) {
  return children
    .filter((child) => child !== null && child !== undefined)
    .map((child) => (typeof child === "string" ? visible(child) : child));
}

// Put another text in; the same one is left alone, since somebody may have selected it.
export function say(node, text) {
  const shown = visible(text);
  if (node.textContent !== shown) node.textContent = shown;
}

// Shown by their code points: control characters, marks of direction, ends of lines and paragraphs, what has no width, variation
// selectors and tags.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\u{e0000}-\u{e007f}\u{e0100}-\u{e01ef}]/gu;
const SHOWN_AT_FIRST = 4000, SHOWN_MORE = 20_000;

export function visible(text) {
  return text.replace(HIDDEN, (mark) => {
    const code = mark.codePointAt(0).toString(16).padStart(4, "0");
    return code.length > 4 ? `\\u{${code}}` : `\\u${code}`;
  });
}

// A model's text; of what is very long a button shows more and more.
export function modelText(text, attributes = {}) {
  const node = element("span", { dir: "ltr", ...attributes });
  showMore(node, text, SHOWN_AT_FIRST);
  return node;
}

function showMore(node, text, length) {
  node.append(visible(text.slice(0, length)));
  const rest = text.slice(length);
  if (!rest) return;
  const button = element("button", { type: "button", class: "more" }, `… ${rest.length.toLocaleString("en")} more characters`);
  button.addEventListener("click", () => {
    button.remove();
    showMore(node, rest, SHOWN_MORE);
  });
  node.append(button);
}

// Seconds in the unit that people would say.
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return `${Math.round(seconds / 3600)} h`;
}

export function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  return Number(value).toFixed(digits).replace("-", "−");
}

export function signed(value, digits = 3) {
  return value > 0 ? `+${number(value, digits)}` : number(value, digits);
}
