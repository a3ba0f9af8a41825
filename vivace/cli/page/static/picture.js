// A drawing for an item that has no picture: colour and motif by its category, arrangement by its id.
import { s } from "./dom.js";

// Paul Tol's "light" scheme, told apart with every kind of colour vision; the motif tells categories apart without
// colour
const COLOURS = ["#77aadd", "#ee8866", "#eedd88", "#ffaabb", "#99ddff", "#44bb99", "#bbcc33", "#aaaa00"];
const INK = "#1b2333";
const SHADES = ["0.78", "0.42", "0.2"];

/** 32 bits of a text (FNV-1a). */
function hash(text) {
  let value = 2166136261;
  for (const character of text) value = Math.imul(value ^ character.codePointAt(0), 16777619) >>> 0;
  return value >>> 0;
}

const MOTIFS = [
  (x, y, r) => s("circle", { cx: x, cy: y, r }),
  (x, y, r) => s("rect", { x: x - r, y: y - r, width: 2 * r, height: 2 * r, rx: r / 4 }),
  (x, y, r) => s("path", { d: `M${x} ${y - r}L${x + r} ${y + r * 0.8}H${x - r}Z` }),
  (x, y, r) => s("path", { d: `M${x} ${y - r}L${x + r} ${y}L${x} ${y + r}L${x - r} ${y}Z` }),
  (x, y, r) => s("path", { d: `M${x - r} ${y + r / 2}A${r} ${r} 0 0 1 ${x + r} ${y + r / 2}Z` }),
  (x, y, r) => s("path", { d: `M${x - r} ${y}H${x + r}M${x} ${y - r}V${y + r}`, "stroke-width": r / 1.6, stroke: INK }),
  (x, y, r) => s("ellipse", { cx: x, cy: y, rx: r, ry: r / 2 }),
];

/** SVG of an item's card; decoration, so hidden from screen readers. */
export function picture(card) {
  const category = card.kind;
  const kind = hash(category || card.id);
  const one = hash(card.id);
  const motif = MOTIFS[Math.floor(kind / 8) % MOTIFS.length];
  const shapes = s("g", { fill: INK });
  for (let place = 0; place < 3; place += 1) {
    const part = (one >>> (place * 9)) & 511;
    const shape = motif(38 + place * 42 + (part % 17) - 8, 35 + (part % 19) - 9, 13 + (part % 11));
    shape.setAttribute("opacity", SHADES[(place + one) % 3]);
    shapes.append(shape);
  }
  const text = s("text", { x: 10, y: 79, fill: INK, "font-size": 13, "font-weight": 600 });
  text.textContent = category.length > 20 ? `${category.slice(0, 19)}…` : category;
  const ground = s("rect", { width: 160, height: 88, fill: COLOURS[kind % COLOURS.length] });
  return s("svg", { viewBox: "0 0 160 88", "aria-hidden": "true", class: "picture" }, ground, shapes, text);
}
