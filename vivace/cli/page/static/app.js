// The frame of the page: which view is shown, whether the server answers, light or dark.
import { get, onReach, reached } from "./dom.js";
import { View as Person } from "./person.js";

const VIEWS = {
  person: { title: "Try it as a person", load: async () => Person },
  operations: { title: "Operations", load: async () => (await import("./operations.js")).View },
  models: { title: "Models", load: async () => (await import("./models.js")).View },
};
const RETRY_MS = 1500;
const $ = (id) => document.getElementById(id);
const views = {};
let about = null;
let shown = "";
let retry = 0;

async function show() {
  const name = location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "person";
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  for (const each of Object.keys(VIEWS)) $(each).hidden = each !== name;
  $("heading").textContent = VIEWS[name].title;
  document.title = `${VIEWS[name].title} · Vivace`;
  if (shown && shown !== name) views[shown]?.leave?.();
  shown = name;
  if (!about) return;
  views[name] ??= new (await VIEWS[name].load())($(name), about);
  await views[name].enter?.();
}

onReach((away, message) => {
  $("away").hidden = !away;
  $("away").textContent = message;
  if (!away) return;
  $("server").textContent = "server away";
  $("server").dataset.state = "away";
  again();
});

function again() {
  clearTimeout(retry);
  retry = setTimeout(connect, RETRY_MS);
}

/** Asks what is served until it is answered; then the view that is shown goes on. */
async function connect() {
  try {
    const now = await get("/api/about");
    const first = about === null;
    about = now;
    $("server").textContent = `${now.run || now.data || "server"} at ${now.address}`;
    $("server").dataset.state = "ok";
    reached(false);
    if (first) await show();
    else await views[shown]?.back?.(now);
  } catch (error) {
    $("away").hidden = false;
    $("away").textContent = error.message;
    again();
  }
}

function theme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").textContent = dark ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", dark ? "Light colours" : "Dark colours");
}
const prefers = matchMedia("(prefers-color-scheme: dark)");
theme(prefers.matches);
prefers.addEventListener("change", () => theme(prefers.matches));
$("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme !== "dark"));
addEventListener("hashchange", show);
show();
connect();
