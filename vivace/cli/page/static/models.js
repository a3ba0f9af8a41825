// The model's view: how good it is, how it was trained, and whether the world is still the one it was trained on.
import { lines, table } from "./chart.js";
import { get, h, number } from "./dom.js";

const panel = (title, ...children) => h("section", { className: "panel" }, h("h2", {}, title), children);
const LOSS = "loss";
const NDCG = "NDCG@10";

export class View {
  constructor(root) {
    this.root = root;
    this.status = h("p", { className: "status", role: "status" }, "Reading what was measured …");
    this.grid = h("div", { className: "grid" });
    root.append(this.status, this.grid);
  }

  async enter() {
    try {
      const found = await get("/api/models");
      this.status.textContent = "As 'vivace train', 'evaluate' and 'report' left it in the run's folder.";
      this.status.dataset.kind = "";
      this.grid.replaceChildren(...this.panels(found).filter(Boolean));
    } catch (error) {
      this.status.textContent = error.message;
      this.status.dataset.kind = "bad";
    }
  }

  back() {
    return this.enter();
  }

  panels(found) {
    const named = Object.entries(found.curves).filter(([, epochs]) => epochs.length);
    const curve = (of) => named.map(([name, epochs]) =>
      ({ name, points: epochs.filter((one) => Number.isFinite(one[of])).map((one) => [one.epoch, one[of]]) }));
    return [
      found.table.length && h("div", { className: "wide" }, this.quality(found)),
      named.length && panel("Training: NDCG@10 of the validation requests",
        lines(curve(NDCG), { x: "epoch", marks: true }, "NDCG@10 by epoch")),
      named.length && panel("Training: loss", lines(curve(LOSS), { x: "epoch", marks: true }, "Loss by epoch")),
      ...Object.entries(found.figures).map(([name, shows]) => {
        const [title, what] = shows.split(": ");
        return panel(title, what && h("p", { className: "note" }, what), h("img", { className: "figure", src: `/figures/${name}`, alt: shows }));
      }),
      found.drift.length && h("div", { className: "wide" }, this.drift(found.drift)),
      found.missing.length && h("div", { className: "wide" }, panel("Not measured yet",
        h("ul", {}, found.missing.map((one) => h("li", {}, `${one.what}. `, h("code", {}, one.command)))))),
    ];
  }

  quality(found) {
    const interval = (of) => (of ? `${number(of[0], 4)} to ${number(of[1], 4)}` : "–");
    return panel("Quality",
      table("Quality of each method", ["method", NDCG, "95 % interval", "HR@10"],
        found.table.map((one) => [one.method, number(one.ndcg, 4), interval(one.interval), number(one.hr, 4)])),
      h("p", { className: "note" }, `${number(found.requests)} held-out requests; intervals over users, by bootstrap. `,
        Object.entries(found.protocol).map(([name, value]) => `${name}: ${value}`).join("; "), "."));
  }

  drift(features) {
    const figure = (value) => (value === null ? "–" : number(value, 3));
    return panel("Drift: the last hour beside training",
      table("Drift of features", ["feature", "version", "in training", "now", "requests", "PSI", "verdict"],
        features.map((one) => [one.feature, String(one.version), String(one.reference), String(one.now), number(one.requests),
          figure(one.psi), one.verdict])),
      h("p", { className: "note" }, "PSI below .1 is stable, from .25 on a large shift."));
  }
}
