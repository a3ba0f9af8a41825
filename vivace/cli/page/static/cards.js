// One item of an answer.
import { h, number } from "./dom.js";
import { picture } from "./picture.js";

const BADGES = { new: "new in the catalogue", rising: "clicked much in the last hour", seen: "is in the history" };

export const tag = (text) => h("span", { className: "tag" }, text);

/** ``does``: types, label, act(type), skip(), why(language) or null. */
export function card(item, does) {
  const attributes = Object.values(item.attributes).join(" · ");
  const heads = Object.entries(item.heads).filter(([, value]) => value > 0);
  const reasons = h("div", { className: "why", hidden: true });
  const asks = does.why && h("button", {
    type: "button", className: "link", "aria-expanded": "false", "aria-label": `Why ${item.title}?`,
    onclick: (event) => unfold(event.currentTarget, reasons, does.why),
  }, "Why?");
  const act = (type) => h("button", {
    type: "button", "data-type": type || "event", "aria-label": `${does.label(type)} ${item.title}`,
    onclick: () => does.act(type),
  }, does.label(type));
  return h("li", { className: "card", "data-item": item.id },
    h("div", { className: "frame" }, picture(item),
      h("span", { className: "badges" },
        item.badges.map((badge) => h("span", { className: `badge ${badge}`, title: BADGES[badge] }, badge)))),
    h("div", { className: "body" },
      h("h3", {}, h("span", { className: "place" }, `${item.place}`), item.title),
      h("p", { className: "facts" },
        item.price !== null && h("b", { className: "price", title: "price" }, number(item.price, 2)),
        h("span", {}, attributes)),
      h("p", { className: "odds" },
        heads.map(([name, value]) => `${name} ${number(100 * value, 1)} %`).join("  ·  "), asks),
      item.found_by.length > 0 && h("p", { className: "odds" }, `found by ${item.found_by.join(", ")}`),
      h("div", { className: "acts" }, does.types.map(act),
        h("button", {
          type: "button", className: "quiet", "aria-label": `Skip ${item.title}`,
          title: "Hides it here; nothing is stored", onclick: does.skip,
        }, "Skip")),
      reasons));
}

async function unfold(button, panel, why) {
  const open = panel.hidden;
  panel.hidden = !open;
  button.setAttribute("aria-expanded", String(open));
  if (!open || panel.querySelector(".sentence")) return; // what failed is asked again
  await tell(panel, why, navigator.language.startsWith("zh") ? "zh" : "en");
}

const LANGUAGES = { en: ["English", "."], zh: ["中文", "。"] };

/** Draws the reasons in a language, with a button for the other one. */
async function tell(panel, why, language, focus = false) {
  panel.replaceChildren(h("p", { role: "status" }, "Asking again without each part …"));
  try {
    const reasons = await why(language);
    const other = language === "zh" ? "en" : "zh";
    const change = h("button", {
      type: "button", className: "link", lang: other, onclick: () => tell(panel, why, other, true),
    }, LANGUAGES[other][0]);
    panel.replaceChildren(...drawn(reasons, language), change);
    if (focus) change.focus();
  } catch (error) {
    panel.replaceChildren(h("p", { className: "bad" }, error.message));
  }
}

function drawn(reasons, lang) {
  const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + LANGUAGES[lang][1];
  const most = Math.max(...reasons.parts.map((part) => part.effect ?? 0), 1e-6);
  return [
    h("p", { className: "sentence", lang }, sentence(reasons.sentence)),
    reasons.path ? h("p", { className: "path", lang, title: "Read off the catalogue; it is no reason of its own" },
      sentence(reasons.path)) : "",
    h("ul", { className: "reasons" }, reasons.parts.slice(0, 4).map((part) =>
      h("li", {}, h("span", {}, part.name),
        h("meter", {
          min: 0, max: 1, value: part.effect === null ? 1 : Math.max(0, part.effect / most),
          "aria-label": `weight of ${part.name}`,
        }),
        h("small", {}, part.place ? `without it: place ${part.place}` : "without it: not among the candidates")))),
    h("p", { className: "source" }, "By asking the same server again without each part; nothing is estimated."),
  ];
}
