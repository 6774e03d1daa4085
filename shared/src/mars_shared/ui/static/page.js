// Which part of the page is shown: the address after # says it, so that every view has a link.

import { KeyWanted, ask, giveKey } from "./api.js";
import { curvesView } from "./curves.js";
import { element, say, visible } from "./dom.js";
import { groupView } from "./group.js";
import { groupsView } from "./groups.js";
import { heldFocus } from "./part.js";
import { inShort, servicesView } from "./services.js";

const EVERY_MS = 2000;
const main = document.getElementById("main");
const run = document.getElementById("run");
const said = document.getElementById("said");
let shown = null;

function routed() {
  const [path, query] = location.hash.replace(/^#/, "").split("?");
  const parameters = Object.fromEntries(new URLSearchParams(query ?? ""));
  if (path === "/groups") return groupsView(parameters);
  if (path === "/group") return groupView(parameters);
  if (path === "/services") return servicesView();
  return curvesView();
}

// A view is {node, refresh(): Promise, key(event)}; refresh is called at once and then every two seconds.
async function show() {
  const view = routed();
  shown = view;
  for (const link of document.querySelectorAll("nav a")) {
    const target = link.getAttribute("href");
    const here = target === "#/" ? /^(#\/?)?$/.test(location.hash) : location.hash.startsWith(target.replace(/s$/, ""));
    link.toggleAttribute("aria-current", here);
  }
  const giveFocusBack = heldFocus(main);
  main.replaceChildren(view.node);
  await refresh(view);
  giveFocusBack();
}

async function refresh(view) {
  try {
    const [status] = await Promise.all([ask("/v1/status"), view.refresh()]);
    say(run, inShort(status));
    document.title = visible(`${status.name} · mars`);
    say(said, "");
  } catch (error) {
    if (view !== shown) return;
    if (error instanceof KeyWanted) askForKey();
    else say(said, error.message);
  }
}

function askForKey() {
  shown = null;
  const field = element("input", { type: "password", id: "key", name: "key", autocomplete: "current-password", required: true });
  const wrong = element("p", { role: "alert" });
  const form = element("form", { class: "key" },
    element("label", { for: "key" }, "API key of this run (MARS_API_KEY)"), field, element("button", {}, "Open"), wrong);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (await giveKey(field.value)) await show();
    else wrong.textContent = "That is not the key that the services were started with.";
  });
  main.replaceChildren(form);
  field.focus();
}

async function follow() {
  if (shown && !document.hidden) await refresh(shown);
  setTimeout(follow, EVERY_MS);
}

addEventListener("hashchange", show);
addEventListener("keydown", (event) => {
  const typing = event.target instanceof HTMLInputElement || event.target instanceof HTMLSelectElement;
  if (!typing && !event.ctrlKey && !event.metaKey && !event.altKey) shown?.key?.(event);
});
await show();
setTimeout(follow, EVERY_MS);
