// The person's view: who, what they did, what they ask for, and the answer with its reasons.
import { card, tag } from "./cards.js";
import { get, h, number, post, redraw, settled } from "./dom.js";
import { picture } from "./picture.js";

const label = (type) => (type ? type.charAt(0).toUpperCase() + type.slice(1) : "Event");
const SHOWN_EVENTS = 30;
const SHOWN_ITEMS = 12;
const TYPE_MS = 120;

export class View {
  constructor(root, about) {
    this.root = root;
    this.about = about;
    this.user = "";
    this.stored = []; // events of the store, oldest first
    this.draft = null; // the edited history; null: the stored one counts
    this.skipped = new Set();
    this.filters = {};
    this.types = about.event_types.length ? about.event_types : [""];
    this.build();
  }

  // -- frame ------------------------------------------------------------------------------------------
  build() {
    const p = (this.parts = {
      people: h("ul", { className: "choices", "aria-label": "People that match" }),
      who: h("p", { className: "who" }),
      history: h("ol", { className: "history", "aria-label": "History, newest first", tabIndex: 0 }),
      found: h("ul", { className: "choices", "aria-label": "Items that match" }),
      edited: h("p", { className: "edited" }),
      status: h("p", { className: "status", role: "status" }),
      understood: h("div", { className: "understood" }),
      items: h("ol", { className: "cards", "aria-label": "Answer, best first" }),
    });
    this.personInput = h("input", {
      type: "search", id: "person-input", autocomplete: "off", spellcheck: false, placeholder: "id, or a part of it",
      oninput: settled(() => this.suggestPeople(), TYPE_MS),
      onkeydown: (event) => event.key === "Enter" && this.choose(this.personInput.value.trim()),
    });
    this.itemInput = h("input", {
      type: "search", id: "item-input", autocomplete: "off", spellcheck: false, placeholder: "words of its title",
      oninput: settled(() => this.suggestItems(), TYPE_MS),
    });
    this.whatIf = h("input", { type: "radio", name: "mode", id: "what-if", checked: true });
    this.store = h("input", { type: "radio", name: "mode", id: "store", onchange: () => this.reset() });
    this.root.append(this.side(p), h("div", { className: "content" }, this.search(), p.understood, p.status, p.items));
  }

  side(p) {
    const mode = (input, name, text) => h("label", {}, input, h("span", {}, h("b", {}, name), text));
    return h("aside", { className: "side", "aria-label": "Person and history" },
      h("section", { className: "panel" },
        h("h2", {}, "Who"),
        h("label", { htmlFor: "person-input" }, "Person"), this.personInput, p.people,
        h("div", { className: "row" },
          h("button", { type: "button", onclick: () => this.choose(newcomer()) }, "New visitor"))),
      h("section", { className: "panel" },
        h("h2", {}, "History"), p.who,
        h("fieldset", { className: "modes" },
          h("legend", {}, "What a click on an item does"),
          mode(this.whatIf, "Try", ": what if? Nothing is stored"),
          mode(this.store, "Store", ": sent to the server, for good")),
        p.edited, p.history,
        h("label", { htmlFor: "item-input" }, "Add another item"), this.itemInput, p.found));
  }

  search() {
    const there = this.about.search;
    this.queryInput = h("input", {
      type: "search", id: "query", autocomplete: "off", disabled: !there,
      placeholder: there ? "What are you looking for? Typing errors are welcome" : "This run has no search",
      title: there ? "" : "vivace train --task search, then vivace compile, make a run searchable",
      oninput: settled(() => { this.filters = {}; this.ask(); }, TYPE_MS),
    });
    this.diversity = h("input", {
      type: "range", id: "diversity", min: 0, max: 1, step: 0.1, value: 0, oninput: settled(() => this.ask(), TYPE_MS),
    });
    this.unseen = h("input", { type: "checkbox", id: "unseen", onchange: () => this.ask() });
    this.tools = h("div", { className: "tools", hidden: true },
      h("label", { htmlFor: "diversity" }, "Variety"), this.diversity,
      h("label", { className: "check" }, this.unseen, "Leave out what is in the history"));
    return h("div", { className: "ask", role: "search" },
      h("label", { htmlFor: "query", className: "hidden" }, "Search"), this.queryInput, this.tools);
  }

  async enter() {
    if (this.entered) return;
    this.entered = true;
    const people = await get("/api/people?q=").catch(() => []);
    this.drawPeople(people);
    await this.choose(people[0]?.id ?? newcomer());
  }

  /** The server is back. */
  async back(about) {
    this.about = about;
    await this.reload();
  }

  // -- who --------------------------------------------------------------------------------------------
  async suggestPeople() {
    this.drawPeople(await get(`/api/people?q=${encodeURIComponent(this.personInput.value.trim())}`));
  }

  drawPeople(people) {
    this.parts.people.replaceChildren(...people.slice(0, 4).map((person) =>
      h("li", {}, h("button", { type: "button", onclick: () => this.choose(person.id) },
        h("span", {}, person.id), h("small", {}, `${number(person.events)} events`)))));
  }

  async choose(user) {
    this.user = user;
    this.personInput.value = user;
    this.draft = null;
    this.skipped.clear();
    this.filters = {};
    await this.reload();
  }

  /** The stored history anew, and the answer to it, at the same time. */
  async reload() {
    const asked = this.ask();
    const user = this.user;
    const nobody = { events: [], known: false };
    const { events, known } = user
      ? await get(`/api/history?user=${encodeURIComponent(user)}`).catch(() => nobody) : nobody;
    if (user !== this.user) return;
    this.stored = events;
    const none = this.about.local ? `${user || "Nobody"} has no stored history yet.` : "Stored events cannot be shown.";
    this.parts.who.textContent = known ? `${number(events.length)} stored events of ${user}.` : none;
    this.drawHistory();
    await asked;
  }

  // -- history ----------------------------------------------------------------------------------------
  get events() {
    return this.draft ?? this.stored;
  }

  drawHistory() {
    const newest = this.events.map((event, place) => ({ event, place })).reverse();
    const drawn = newest.slice(0, SHOWN_EVENTS).map(({ event, place }) => this.drawEvent(event, place));
    const more = newest.length - SHOWN_EVENTS;
    if (more > 0) drawn.push(h("li", { className: "rest" }, `and ${number(more)} older events`));
    if (!newest.length) drawn.push(h("li", { className: "rest" }, "Nothing yet. Click on an item to begin."));
    redraw(this.parts.history, drawn);
    this.parts.edited.replaceChildren();
    if (!this.draft) return;
    this.parts.edited.append(h("b", {}, "What if: "), "this history is edited on this page alone. ",
      h("button", { type: "button", onclick: () => this.reset() }, "Back to what is stored"));
  }

  drawEvent(event, place) {
    const title = event.card.title;
    return h("li", {}, picture(event.card),
      h("span", { className: "what" }, h("span", {}, title), event.type && tag(event.type)),
      h("button", {
        type: "button", className: "quiet", "aria-label": `Leave ${title} out`, title: "Leave it out",
        onclick: () => this.leaveOut(place),
      }, "×"));
  }

  reset() {
    if (!this.draft) return;
    this.draft = null;
    this.drawHistory();
    this.ask();
  }

  leaveOut(place) {
    this.whatIf.checked = true;
    this.draft = this.events.filter((_, each) => each !== place);
    this.drawHistory();
    this.ask();
  }

  /** A click on an item: in the copy on this page, or stored. */
  async act(item, type) {
    if (this.whatIf.checked) {
      this.draft = [...this.events, { item: item.id, type, time: Date.now(), card: item }];
      this.drawHistory();
      await this.ask();
      return;
    }
    const event = { user: this.user, item: item.id, type, request_id: this.answer?.request_id ?? "" };
    try {
      const done = await post("/api/append", event);
      await this.reload();
      if (done.status && done.status !== "ok") this.say(done.status, "warn");
    } catch (error) {
      this.say(error.message, "bad");
    }
  }

  skip(item) {
    this.skipped.add(item.id);
    this.ask();
  }

  async suggestItems() {
    const words = this.itemInput.value.trim();
    const items = words ? await get(`/api/items?q=${encodeURIComponent(words)}`) : [];
    const add = (item) => {
      this.itemInput.value = "";
      this.parts.found.replaceChildren();
      this.act(item, this.types[0]);
    };
    this.parts.found.replaceChildren(...items.map((item) =>
      h("li", {}, h("button", { type: "button", onclick: () => add(item) },
        h("span", {}, item.title), h("small", {}, item.id)))));
  }

  // -- the answer -------------------------------------------------------------------------------------
  say(text, kind = "") {
    this.parts.status.textContent = text;
    this.parts.status.dataset.kind = kind;
  }

  asked() {
    const query = this.queryInput.value.trim();
    const filters = Object.keys(this.filters).length ? { values: this.filters } : {};
    if (this.unseen.checked) filters.seen = false;
    return {
      user: this.user, query, top_k: Math.min(48, SHOWN_ITEMS + this.skipped.size),
      history: this.draft?.map(({ item, type, time }) => ({ item, type, time })) ?? null,
      diversity: Number(this.diversity.value), filters: query && Object.keys(filters).length ? filters : null,
    };
  }

  async ask() {
    this.pending?.abort();
    const pending = (this.pending = new AbortController());
    this.tools.hidden = !this.queryInput.value.trim();
    try {
      this.answer = await post("/api/recommend", this.asked(), pending.signal);
      if (pending === this.pending) this.drawAnswer();
    } catch (error) {
      if (error.name !== "AbortError") this.say(error.message, "bad");
    }
  }

  drawAnswer() {
    const items = this.answer.items.filter((item) => !this.skipped.has(item.id)).slice(0, SHOWN_ITEMS);
    this.reasons = {}; // by language
    const words = this.answer.words || this.answer.status;
    this.say(`${words} It took ${number(this.answer.ms)} ms.`, this.answer.degraded ? "warn" : "");
    if (this.answer.degraded) this.parts.status.append(h("small", {}, ` STATUS ${this.answer.status}`));
    this.drawUnderstood(this.answer.understood);
    redraw(this.parts.items, items.map((item) => card(item, {
      types: this.types, label, act: (type) => this.act(item, type), skip: () => this.skip(item),
      why: this.about.explain ? (language) => this.why(item, language) : null,
    })));
    document.body.dataset.drawn = String(Number(document.body.dataset.drawn ?? 0) + 1);
  }

  /** Of one item; the server explains the whole answer at once. */
  async why(item, language) {
    const reasons = this.reasons;
    reasons[language] ??= post("/api/why", { ...this.asked(), language }).catch((error) => {
      delete reasons[language];
      throw error;
    });
    const of = (await reasons[language])[item.id];
    if (!of) throw new Error("The answer has changed since: this item is not in it any more.");
    return of;
  }

  drawUnderstood(of) {
    const parts = [];
    const corrected = Object.entries(of.corrected ?? {});
    if (corrected.length) {
      parts.push(h("p", {}, "Understood as ", corrected.flatMap(([word, as], place) =>
        [place ? ", " : "", h("b", {}, String(as)), ` (for “${word}”)`])));
    }
    for (const [name, counts] of Object.entries(of.facets ?? {})) {
      if (counts.length) parts.push(this.facet(name, counts));
    }
    redraw(this.parts.understood, parts);
  }

  facet(name, counts) {
    const chips = counts.slice(0, 8).map(([value, count]) => h("button", {
      type: "button", className: "chip", "aria-pressed": String((this.filters[name] ?? []).includes(value)),
      onclick: () => this.filter(name, value),
    }, value, h("small", {}, ` ${number(count)}`)));
    return h("div", { className: "facet", role: "group", "aria-label": `Filter by ${name}` },
      h("span", {}, label(name)), chips);
  }

  filter(name, value) {
    const chosen = new Set(this.filters[name] ?? []);
    if (!chosen.delete(value)) chosen.add(value);
    if (chosen.size) this.filters[name] = [...chosen];
    else delete this.filters[name];
    this.ask();
  }
}

const newcomer = () => `visitor-${Math.random().toString(36).slice(2, 8)}`;
