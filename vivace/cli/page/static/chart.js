// Line charts as SVG: lines differ by dash and mark as well as by colour.
import { h, number, s } from "./dom.js";

const COLOURS = ["#4477aa", "#cc6677", "#228833", "#aa7711", "#8855aa"];
const DASHES = ["", "6 3", "2 3", "9 3 2 3", "1 4"];
const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP] = [520, 200, 46, 34, 10];

const style = (place) => ({
  stroke: COLOURS[place % COLOURS.length], "stroke-dasharray": DASHES[place % DASHES.length], "stroke-width": 2,
  fill: "none",
});

/** ``series``: [{name, points: [[x, y]], low?: [[x, y]], high?}]; ``axis``: {x, y, zero, marks}. */
export function lines(series, axis, label) {
  const points = series.flatMap((one) => [...one.points, ...(one.band ?? []).flatMap(([x, low, high]) => [[x, low], [x, high]])]);
  if (!points.length) return h("p", { className: "note" }, "Nothing yet.");
  const xs = points.map(([x]) => x);
  const ys = points.map(([, y]) => y).filter(Number.isFinite);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  const y0 = axis.zero ? 0 : Math.min(...ys);
  const y1 = Math.max(...ys, y0 + 1e-9);
  const atX = (x) => LEFT + ((x - x0) / (x1 - x0 || 1)) * (WIDTH - LEFT - 12);
  const atY = (y) => HEIGHT - BOTTOM - ((y - y0) / (y1 - y0 || 1)) * (HEIGHT - BOTTOM - TOP);
  const svg = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart", role: "img", "aria-label": label });
  const write = (x, y, anchor, words) => {
    const text = s("text", { x, y, "text-anchor": anchor });
    text.textContent = words;
    svg.append(text);
  };
  const digits = y1 - y0 < 0.1 ? 3 : y1 - y0 < 2 ? 2 : y1 - y0 < 20 ? 1 : 0;
  for (const part of [0, 0.5, 1]) {
    const y = y0 + part * (y1 - y0);
    svg.append(s("line", { x1: LEFT, x2: WIDTH - 12, y1: atY(y), y2: atY(y), stroke: "currentColor", "stroke-opacity": 0.15 }));
    write(LEFT - 6, atY(y) + 4, "end", number(y, digits));
  }
  write(LEFT, HEIGHT - 16, "start", `${number(x0, x0 % 1 ? 2 : 0)}`);
  write(WIDTH - 12, HEIGHT - 16, "end", `${number(x1, x1 % 1 ? 2 : 0)}`);
  write((LEFT + WIDTH) / 2, HEIGHT - 3, "middle", axis.x);
  series.forEach((one, place) => {
    if (one.band?.length) {
      const upper = one.band.map(([x, , high]) => `${atX(x)},${atY(high)}`);
      const lower = one.band.map(([x, low]) => `${atX(x)},${atY(low)}`).reverse();
      svg.append(s("polygon", { points: [...upper, ...lower].join(" "), fill: COLOURS[place % COLOURS.length], "fill-opacity": 0.15 }));
    }
    svg.append(s("polyline", { points: one.points.map(([x, y]) => `${atX(x)},${atY(y)}`).join(" "), ...style(place) }));
    if (axis.marks) for (const [x, y] of one.points) svg.append(s("circle", { cx: atX(x), cy: atY(y), r: 3, fill: COLOURS[place % COLOURS.length] }));
  });
  const keys = series.map((one, place) =>
    h("span", {}, s("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" }, s("line", { x1: 0, x2: 22, y1: 4, y2: 4, ...style(place) })), one.name));
  return h("div", {}, svg, h("p", { className: "legend" }, keys));
}

/** ``rows`` of texts; the first cell of each is its heading. */
export function table(caption, header, rows) {
  return h("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": caption },
    h("table", {},
      h("caption", { className: "hidden" }, caption),
      h("thead", {}, h("tr", {}, header.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, rows.map(([first, ...rest]) =>
        h("tr", {}, h("th", { scope: "row" }, first), rest.map((cell) => h("td", {}, cell)))))));
}
