// The operator's view: what the server does each second, load, versions and rollouts.
import { lines, table } from "./chart.js";
import { get, h, isAway, number, post } from "./dom.js";

const SECONDS = 90;
const share = (part) => `${number(100 * part, part && part < 0.1 ? 1 : 0)} %`;
const panel = (title, ...children) => h("section", { className: "panel" }, h("h2", {}, title), children);

export class View {
  constructor(root) {
    this.root = root;
    this.past = [];
    this.build();
  }

  build() {
    const p = (this.parts = {
      state: h("p", { className: "status", role: "status" }, "Waiting for the first second …"),
      tiles: h("dl", { className: "tiles" }),
      health: h("ul", { className: "parts" }),
      stages: h("div"),
      rate: h("div"),
      latency: h("div"),
      versions: h("div"),
      trial: h("div", { className: "note" }),
      counts: h("p", { className: "status", role: "status" }, "No load from this page."),
      changed: h("p", { className: "status", role: "status" }),
    });
    this.rate = h("input", {
      type: "range", id: "load-rate", min: 1, max: 100, value: 20, oninput: () => this.showRate(),
      onchange: () => this.loading && this.load(),
    });
    this.rateShown = h("output", { htmlFor: "load-rate" });
    this.go = h("button", { type: "button", className: "primary", onclick: () => (this.loading ? this.stop() : this.load()) }, "Send load");
    this.root.append(h("div", { className: "grid" },
      h("div", { className: "wide" }, p.state),
      panel("Now", p.tiles, p.health),
      panel("Load",
        h("label", { htmlFor: "load-rate" }, "Requests a second"), h("div", { className: "row" }, this.rate, this.rateShown),
        h("div", { className: "row" }, this.go),
        p.counts,
        h("p", { className: "note" }, "Open loop, at most 100 a second for a minute. It ends with this page.")),
      h("div", { className: "wide" }, panel("The way through the stages", p.stages)),
      panel("Requests a second", p.rate), panel("Milliseconds of a call in the server", p.latency),
      h("div", { className: "wide" }, panel("Versions", p.versions, p.trial, this.rollout(), p.changed))));
    this.showRate();
  }

  rollout() {
    this.key = h("input", { type: "password", id: "operator-key", autocomplete: "off", required: true });
    this.plan = {
      percent: h("input", { type: "text", id: "percent", value: "5", title: "Several by commas: one step each; 0 first: copies alone" }),
      wait: h("input", { type: "text", id: "wait", value: "10m", title: "Such as 30s, 10m or 2h" }),
      shadow: h("input", {
        type: "number", id: "shadow", min: 0, max: 100, step: "any", value: 0,
        title: "Of the other calls it gets a copy, whose answer nobody sees",
      }),
      least_quality: h("input", {
        type: "number", id: "least-quality", min: 0, max: 1, step: 0.01, value: 0.67,
        title: "Share of the served version's recorded quality that it must have",
      }),
      interleave: h("input", { type: "checkbox", id: "interleave" }),
      promote: h("input", { type: "checkbox", id: "promote" }),
    };
    this.version = h("select", { id: "version" });
    const act = (name, action) => h("button", { type: "button", onclick: () => this.change(action) }, name);
    return h("form", { className: "row rollout", "aria-label": "Rollout", onsubmit: (event) => event.preventDefault() },
      h("label", {}, "Operator's key", this.key), h("label", {}, "Version", this.version),
      h("label", {}, "Users, per cent of each step", this.plan.percent), h("label", {}, "A step lasts", this.plan.wait),
      h("label", {}, "Copies, per cent", this.plan.shadow), h("label", {}, "Least quality", this.plan.least_quality),
      h("label", { className: "check" }, this.plan.interleave, "Draft from both versions"),
      h("label", { className: "check" }, this.plan.promote, "Then serve it to everyone"),
      act("Start a trial", "start"), act("Serve it to everyone", "promote"), act("End the trial", "stop"));
  }

  enter() {
    this.source?.close();
    this.source = new EventSource("/api/watch");
    this.source.onmessage = (event) => this.draw(JSON.parse(event.data));
    this.source.onerror = () => this.say("The page's own process does not answer; it is asked again.", "bad");
  }

  back() {}

  leave() {
    this.source?.close();
    this.stop();
  }

  say(text, kind = "") {
    if (this.parts.state.textContent === text) return;
    this.parts.state.textContent = text;
    this.parts.state.dataset.kind = kind;
  }

  // -- each second ------------------------------------------------------------------------------------
  draw(now) {
    if ((now.error || now.health?.ready === false) && !isAway()) {
      get("/api/about").catch(() => {}); // whether it is the server that is away: the head of the page says so then
    }
    if (now.error) {
      this.say(`The server's metrics cannot be read: ${now.error}`, "bad");
      return;
    }
    const well = now.health.ready;
    const red = Object.entries(now.health.parts ?? {}).filter(([, part]) => !part.ok);
    if (well === undefined) this.say("Health is not known here: give --status-url.");
    else if (well) this.say(`Everything works. Version ${now.health.version}.`);
    else this.say(`Not ready: ${red.map(([name, part]) => `${name} (${part.why ?? "red"})`).join(", ") || now.health.why}`, "bad");
    this.parts.health.replaceChildren(...Object.entries(now.health.parts ?? {}).map(([name, part]) =>
      h("li", { className: part.ok ? "" : "red" }, `${name}: ${part.ok ? "works" : "red"}`)));
    this.drawVersions(now);
    if (now.rate === undefined) return;
    this.past.push(now);
    if (this.past.length > SECONDS) this.past.shift();
    const made = Object.entries(now.answers).filter(([, rate]) => rate > 0);
    const all = made.reduce((sum, [, rate]) => sum + rate, 0);
    const full = made.filter(([how]) => how === "full").reduce((sum, [, rate]) => sum + rate, 0);
    const hits = Object.entries(now.caches);
    const tile = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
    this.parts.tiles.replaceChildren(
      tile("requests a second", number(now.rate, now.rate < 10 ? 1 : 0)),
      tile("mean, ms", now.rate ? number(now.mean_ms, 1) : "–"),
      tile("answered with less", all ? share(1 - full / all) : "–"),
      ...hits.map(([how, rate]) => tile(`cache: ${how}`, number(rate, 0))));
    this.parts.stages.replaceChildren(table("Stages, of the last second",
      ["stage", "requests/s", "mean batch", "waiting now", "in the queue, ms", "at work, ms"],
      now.stages.map((stage) => [stage.model.replaceAll("_", " "), number(stage.rate, 1), number(stage.batch, 1),
        number(stage.pending), number(stage.queue, 2), number(stage.compute, 2)])),
      h("p", { className: "note" }, now.stages.some((stage) => stage.rate) ? "" : "Nobody calls just now."));
    const back = (place) => place - this.past.length + 1;
    this.parts.rate.replaceChildren(lines(
      [{ name: "requests a second", points: this.past.map((one, place) => [back(place), one.rate]) }],
      { x: "seconds", zero: true }, "Requests a second"));
    this.parts.latency.replaceChildren(lines(
      [{ name: "mean", points: this.past.map((one, place) => [back(place), one.mean_ms]) }],
      { x: "seconds", zero: true }, "Mean milliseconds of a call"));
  }

  drawVersions(now) {
    this.parts.versions.replaceChildren(now.versions.length
      ? table("Versions", ["version", "NDCG@10", "users"], now.versions.map((one) =>
        [`${one.version}`, one.ndcg || "–", now.servers ? share(one.traffic) : "not known"]))
      : h("p", { className: "note" }, "Versions are shown where the run's folder is."));
    const numbers = now.versions.map((one) => String(one.version));
    if (numbers.join() !== [...this.version.options].map((option) => option.value).join()) {
      this.version.replaceChildren(...numbers.map((value) => h("option", { value }, value)));
      this.version.value = numbers.at(-1) ?? "";
    }
    const trial = now.rollout;
    const side = (name, of) => `${name}: ${number(of.calls)} calls, ${number(of.failed)} failed, ${number(of.mean_ms, 1)} ms`;
    this.parts.trial.replaceChildren(trial
      ? `Version ${trial.version} on trial: ${trial.result || `step ${trial.step} of ${trial.steps}, ${share(trial.share)} of the users`}. `
        + `${side("It", trial.trial)}; ${side("the served one", trial.served)}.`
      : "No version is on trial.");
  }

  async change(action) {
    const tell = (text, kind) => {
      this.parts.changed.textContent = text;
      this.parts.changed.dataset.kind = kind;
    };
    tell("Under way …", "");
    const plan = Object.entries(this.plan).map(([name, { type, checked, value, valueAsNumber }]) =>
      [name, type === "checkbox" ? checked : type === "number" ? valueAsNumber : value]);
    const body = { action, version: Number(this.version.value), ...Object.fromEntries(plan) };
    try {
      await post("/api/rollout", body, undefined, { "x-operator-key": this.key.value });
      tell("Done.", "");
    } catch (error) {
      tell(error.message, "bad");
    }
  }

  // -- load -------------------------------------------------------------------------------------------
  showRate() {
    this.rateShown.textContent = this.rate.value;
  }

  stop() {
    this.loading?.abort();
  }

  async load() {
    const turn = (this.turn = (this.turn ?? 0) + 1);
    const before = this.loading;
    before?.abort();
    await before?.ended;
    if (turn !== this.turn) return; // a later one takes over
    const loading = (this.loading = new AbortController());
    this.go.textContent = "Stop";
    loading.ended = this.follow(loading).finally(() => {
      if (this.loading !== loading) return;
      this.loading = null;
      this.go.textContent = "Send load";
    });
    await loading.ended;
  }

  async follow(loading) {
    try {
      const body = JSON.stringify({ rate: Number(this.rate.value), seconds: 60 });
      const headers = { "content-type": "application/json" };
      let response;
      for (let tries = 0; tries < 10; tries++) { // the server sees a moment later that the load before was left
        response = await fetch("/api/load", { method: "POST", headers, signal: loading.signal, body });
        if (response.status !== 409) break;
        await new Promise((done) => setTimeout(done, 150));
      }
      if (!response.ok) throw new Error((await response.json()).error);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = ""; ;) {
        const { value, done } = await reader.read();
        if (done) break;
        const parts = (rest + value).split("\n\n");
        rest = parts.pop();
        for (const part of parts) this.count(JSON.parse(part.slice(6)));
      }
    } catch (error) {
      if (error.name !== "AbortError") this.parts.counts.textContent = error.message;
      else this.parts.counts.textContent += " Stopped.";
    }
  }

  count(now) {
    this.parts.counts.textContent =
      `${number(now.sent)} sent, ${number(now.answered)} answered (${number(now.degraded)} with less), ${number(now.failed)} failed`
      + `${now.unsent ? `, ${number(now.unsent)} not sent, as 200 were under way` : ""}. `
      + `${now.p50 === null ? "" : `p50 ${number(now.p50, 1)} ms, p95 ${number(now.p95, 1)} ms. `}${number(now.left)} s left.`;
  }
}
