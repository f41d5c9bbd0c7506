
// Names of runs, problems and responses are untrusted text: only textContent receives them.
const groups = JSON.parse(document.getElementById("data").textContent);
const filters = document.getElementById("filters");

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = visible(text);
  return made;
}

// Invisible characters and those that reorder text are replaced by visible ones.
function visible(text) {
  return String(text)
    .replace(/\n/g, "\u21b5\n")
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/[\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g,
      (c) => "\u27e8U+" + c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0") + "\u27e9");
}

function signed(value) {
  return (value > 0 ? "+" : "") + value.toFixed(3);
}

function known(value, digits) {
  return value == null ? "-" : value.toFixed(digits);
}

// --- one group ---------------------------------------------------------------------------------

// What tokens can be colored by: `of` is a token's value, null where it has none. `ends` are those
// of the scale: 0 and 1 for "share", 0 and the largest for "size", both signs for "signed".
const MODES = {
  p: { kind: "share", ends: ["p = 0", "p = 1"], of: (r, i) => r.tokens?.p[i] },
  c: { kind: "share", ends: ["C = 0", "C = 1"], of: (r, i) => r.tokens?.c[i] },
  ac: { kind: "signed", of: (r, i) => product(r.advantage, r.tokens?.c[i]) },
  logprob: { kind: "size", of: (r, i) => r.ledger?.logprob[i] },
  engine: { kind: "size", of: (r, i) => r.ledger?.engine[i] },
  base: { kind: "size", of: (r, i) => r.ledger?.base[i] },
  gap: { kind: "signed", of: (r, i) => minus(r.ledger?.logprob[i], r.ledger?.engine[i]) },
  moved: { kind: "signed", of: (r, i) => minus(r.ledger?.logprob[i], r.ledger?.base[i]) },
  coefficient: { kind: "signed", of: (r, i) => r.ledger?.coefficient[i] },
  advantage: { kind: "signed", of: (r) => r.ledger?.advantage },
  source: { kind: "source", of: (r) => r.ledger?.source },
};

function product(a, b) { return b == null ? null : a * b; }
function minus(a, b) { return a == null || b == null ? null : a - b; }

function largestOf(group, mode) {
  const { kind, of } = MODES[mode];
  if (kind === "share" || kind === "source") return 1;
  return group.responses.flatMap((r) => (textsOf(r) ?? []).map((_, i) => Math.abs(of(r, i) ?? 0)))
    .reduce((a, b) => Math.max(a, b), 0);
}

// The text of each token: null if the response has neither p nor a ledger.
function textsOf(response) {
  return response.tokens?.text ?? response.ledger?.text ?? null;
}

function tokenSpan(response, i, mode, largest) {
  const text = textsOf(response)[i];
  const span = element("span", "t", text || "\u25cc");
  const { kind, of } = MODES[mode];
  const value = of(response, i) ?? null;
  if (kind === "source") {
    if (value !== null) span.classList.add(i < response.ledger.prefix ? "expert" : value);
  } else if (value !== null && largest) {
    span.style.setProperty("--v", Math.min(Math.abs(value) / largest, 1));
    if (kind === "signed") span.classList.add(value < 0 ? "minus" : "plus");
  }
  const parts = [JSON.stringify(visible(text))];
  if (response.tokens) {
    const { p, c } = response.tokens;
    parts.push(`p ${known(p[i], 4)}`, `C ${known(c[i], 4)}`,
      `A\u00b7C ${c[i] === null ? "-" : signed(response.advantage * c[i])}`);
  }
  if (response.ledger) {
    const { logprob, engine, base, coefficient } = response.ledger;
    parts.push(`log p: trainer ${known(logprob[i], 4)}`, `engine ${known(engine[i], 4)}`,
      `base ${known(base[i], 4)}`,
      `coefficient ${coefficient[i] === null ? "-" : signed(coefficient[i])}`);
  }
  span.dataset.tip = parts.join("   ");
  return span;
}

function responseCard(response, group, mode, largest) {
  const side = response.advantage > 0 ? "up" : response.advantage < 0 ? "down" : "even";
  const card = element("article", `response ${side}`);
  card.dataset.source = response.source;
  const head = card.appendChild(element("header"));
  head.append(element("strong", "", response.source));
  head.append(element("span", "", `reward ${known(response.reward, 2)}`));
  head.append(element("span", "", `A ${signed(response.advantage)}`));
  if (response.cut) head.append(element("span", "bad", "cut"));
  if (response.verdict && response.verdict !== "ok") {
    head.append(element("span", "bad", response.verdict));
  }
  const text = card.appendChild(element("div", "text"));
  const texts = textsOf(response);
  if (!texts) {
    text.textContent = visible(response.text);
    return card;
  }
  text.append(...texts.map((_, i) => tokenSpan(response, i, mode, largest)));
  if (!response.tokens) return card;
  const { p, c } = response.tokens;
  const low = p.map((value) => group.tau !== null && value !== null && value < group.tau);
  low.forEach((under, i) => text.children[i].classList.toggle("rectified", under));
  const mean = c.reduce((sum, value) => sum + value, 0) / (c.length || 1);
  const share = group.tau === null ? "" : `${low.filter(Boolean).length} of `;
  const what = group.tau === null ? "tokens" : "tokens rectified";
  card.append(element("footer", "", `${share}${p.length} ${what}, mean C ${mean.toFixed(2)}`));
  return card;
}

function scale(group, mode, largest) {
  const row = element("div", "scale");
  const { kind, ends } = MODES[mode];
  if (kind === "source") {
    for (const source of ["expert", "teacher", "self"]) row.append(element("span", `t ${source}`, source));
  } else {
    const [low, high] = ends ?? (kind === "size" ? ["0", `${known(-largest, 3)} nats`]
      : [signed(-largest), signed(largest)]);
    const ramp = element("span", `ramp ${kind}`);
    if (kind === "share" && group.tau !== null && group.tau <= 1) {
      ramp.appendChild(element("b")).style.left = `${100 * group.tau}%`;
    }
    row.append(element("span", "", low), ramp, element("span", "", high));
  }
  const tau = group.tau === null ? "" : `, tau = ${group.tau}`;
  const by = group.policy ? `; p by ${group.policy}` : "";
  row.append(element("span", "", `loss of a token ${group.loss}${tau}${by}`));
  return row;
}

function show(group) {
  const chosen = new FormData(filters);
  const select = filters.elements.mode;
  const scored = Boolean(group.policy);
  const recorded = group.responses.some((r) => r.ledger);
  for (const option of select.options) {
    option.disabled = option.hidden = option.dataset.of === "ledger" ? !recorded : !scored;
  }
  select.parentElement.hidden = !scored && !recorded;
  const usable = [...select.options].find((option) => option.value === wanted && !option.disabled)
    ?? [...select.options].find((option) => !option.disabled);
  if (usable) select.value = usable.value;
  const mode = usable ? usable.value : "p";
  const largest = largestOf(group, mode);
  const place = document.getElementById("group");
  place.className = `by-${MODES[mode].kind}`;
  const problem = element("p", "problem", group.text);
  const answer = element("p", "note");
  answer.append("answer ", element("span", "answer", group.answer ?? "none"));
  if (group.flat) answer.append(", flat: all rewards are equal, so that nothing is learned from it");
  const cards = element("div", "responses");
  const sources = chosen.getAll("source");
  const sign = Number(chosen.get("sign"));
  cards.append(...group.responses
    .filter((r) => sources.includes(r.source) && (!sign || Math.sign(r.advantage) === sign))
    .map((r) => responseCard(r, group, mode, largest)));
  place.replaceChildren(problem, answer, ...(usable ? [scale(group, mode, largest)] : []), cards);
}

// --- filters and pages -------------------------------------------------------------------------

let found = [];
let at = 0;
let wanted = "p"; // The color that was chosen last, which not every group has.

function fill(select, values) {
  const before = select.value;
  const all = new Option("all", "");
  select.replaceChildren(all, ...[...new Set(values)].map((v) => new Option(visible(v), v)));
  select.value = before;
  if (select.selectedIndex < 0) select.value = "";
}

function passes(group) {
  const chosen = new FormData(filters);
  const words = chosen.get("text").toLowerCase();
  const texts = [group.text, group.answer ?? "", ...group.responses.map((r) => r.text)];
  return (!chosen.get("run") || group.run === chosen.get("run"))
    && (!chosen.get("step") || String(group.step) === chosen.get("step"))
    && (!chosen.get("kind") || (chosen.get("kind") === "flat") === group.flat)
    && (!words || texts.some((text) => text.toLowerCase().includes(words)));
}

function turn(to) {
  at = Math.max(0, Math.min(to, found.length - 1));
  document.getElementById("previous").disabled = at <= 0;
  document.getElementById("next").disabled = at >= found.length - 1;
  document.getElementById("tip").hidden = true;
  const place = document.getElementById("place");
  if (!found.length) {
    place.textContent = "no group passes the filters";
    document.getElementById("group").replaceChildren();
    return;
  }
  const group = found[at];
  place.textContent = visible(
    `group ${at + 1} of ${found.length}: ${group.run}, step ${group.step}, problem ${group.id}`);
  show(group);
}

function filter() {
  document.getElementById("notice").textContent = "";
  const run = filters.elements.run.value;
  fill(filters.elements.step, groups.filter((g) => !run || g.run === run).map((g) => g.step));
  found = groups.filter(passes);
  turn(0);
}

// The groups of a step, or of the nearest step that has some, of one of these runs if they have any.
function openGroups(step, runs) {
  const own = groups.filter((group) => runs.includes(group.run));
  const some = own.length ? own : groups;
  if (!some.length) return;
  const near = some.reduce((a, b) => (Math.abs(b.step - step) < Math.abs(a.step - step) ? b : a));
  Object.assign(filters.elements.kind, { value: "" });
  filters.elements.text.value = "";
  filters.elements.run.value = own.length ? near.run : "";
  fill(filters.elements.step, groups.filter((g) => !own.length || g.run === near.run).map((g) => g.step));
  filters.elements.step.value = String(near.step);
  filter();
  const notice = document.getElementById("notice");
  notice.textContent = near.step === step ? "" : `No groups of step ${step} are on this page; step ${near.step} is the nearest.`;
  document.getElementById("groups").scrollIntoView();
}

function hover(event) {
  const tip = document.getElementById("tip");
  const text = event.target.dataset?.tip;
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const box = event.target.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 4))}px`;
  const above = box.top > 40 ? box.top - tip.offsetHeight - 6 : box.bottom + 6;
  tip.style.top = `${above + scrollY}px`; // Of the page, so that it moves with its token.
}

if (filters) {
  fill(filters.elements.run, groups.map((group) => group.run));
  for (const source of new Set(groups.flatMap((g) => g.responses.map((r) => r.source)))) {
    const box = element("input");
    Object.assign(box, { type: "checkbox", name: "source", value: source, checked: true });
    const label = element("label");
    label.append(box, source);
    filters.querySelector(".sources").append(label);
  }
  filters.addEventListener("submit", (event) => event.preventDefault());
  filters.elements.text.addEventListener("input", filter);
  filters.addEventListener("change", (event) => {
    if (event.target.name === "mode") wanted = event.target.value;
    if (["run", "step", "kind"].includes(event.target.name)) filter();
    else if (event.target.name !== "text") turn(at);
  });
  document.getElementById("previous").addEventListener("click", () => turn(at - 1));
  document.getElementById("next").addEventListener("click", () => turn(at + 1));
  document.getElementById("group").addEventListener("pointerover", hover);
  document.getElementById("group").addEventListener("pointerleave", hover);
  filter();
}
