// Elements and calls. Texts are always set as text: what a catalogue holds is never read as HTML.

/** An element: properties by name ("on…" a listener, "aria-…" and "data-…" attributes), then children or texts. */
export function h(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key in element && !key.includes("-") && key !== "list") element[key] = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

export function s(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

export class CallError extends Error {
  constructor(message, away) {
    super(message);
    this.away = away;
  }
}

const listeners = [];
let away = false;

/** Whether the server behind the page did not answer when it was last asked. */
export const isAway = () => away;

/** Tells ``listener(away, message)`` whether the server behind the page answers. */
export function onReach(listener) {
  listeners.push(listener);
}

export function reached(isAwayNow, message = "") {
  away = isAwayNow;
  for (const listener of listeners) listener(away, message);
}

async function answer(path, options) {
  let response;
  let body;
  try {
    response = await fetch(path, options);
    body = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const ended = "The page's own process does not answer. Start it again with: vivace ui";
    reached(true, ended);
    throw new CallError(ended, true);
  }
  if (!response.ok) {
    if (body.away) reached(true, body.error);
    throw new CallError(body.error ?? `The page answered ${response.status}.`, Boolean(body.away));
  }
  return body;
}

export const get = (path, signal) => answer(path, { signal });

export const post = (path, body, signal, headers = {}) =>
  answer(path, {
    method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json", ...headers }, signal,
  });

export const number = (value, digits = 0) =>
  Number(value).toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

/** Calls ``work`` once it has not been asked for ``wait`` ms. */
export function settled(work, wait) {
  let timer;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...given), wait);
  };
}

/** Other children of a list; who had the focus in it keeps it: on the same button of the same item, else on the button
 * that has come to its place, so that a keyboard goes on where it was. */
export function redraw(list, children) {
  const held = list.contains(document.activeElement) ? document.activeElement : null;
  const places = [...list.querySelectorAll("button")];
  const place = places.indexOf(held);
  const name = held?.getAttribute("aria-label");
  list.replaceChildren(...children);
  if (!held) return;
  const buttons = [...list.querySelectorAll("button")];
  const same = name && buttons.find((button) => button.getAttribute("aria-label") === name);
  (same || buttons[Math.min(place, buttons.length - 1)] || list).focus();
}
