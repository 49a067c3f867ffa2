"use strict";
// The run page: the list of runs, what is chosen of it, and the tabs. It asks for news as long as it is looked at.

const MOST_CHOSEN = 20;  // of runs that come into view
const tabs = {curves, samples, differences, notes}, letters = {c: "curves", s: "samples", d: "differences", n: "notes"};
const page = {runs: [], chosen: new Set(), rows: new Map(), tab: "curves"};

function status(text) { byId("status").textContent = text; }

const chosenRuns = () => page.runs.filter(run => page.chosen.has(run.id));

function choose(ids) {
  page.chosen = new Set(ids);
  for (const [id, row] of page.rows) row.box.checked = page.chosen.has(id);
  refresh();
}

function refresh() {
  const shown = visible();
  byId("all").checked = shown.length > 0 && shown.every(run => page.chosen.has(run.id));
  tabs[page.tab].update(chosenRuns());
}

function visible() {
  const sought = byId("filter").value.toLowerCase();
  return page.runs.filter(run => `${run.name} ${run.state}`.toLowerCase().includes(sought));
}

function newRow(run) {
  const box = make("input", {type: "checkbox"}), name = make("span"), cells = Array.from({length: 6}, () => make("td"));
  box.checked = page.chosen.has(run.id);
  box.addEventListener("change", () => {
    if (box.checked) page.chosen.add(run.id); else page.chosen.delete(run.id);
    refresh();
  });
  const label = make("label", {for: `run-${run.id}`}, swatch(run.id), name);
  box.id = `run-${run.id}`;
  cells.slice(1).forEach(cell => cell.classList.add("number"));
  const element = make("tr", {}, make("td", {}, box), make("td", {}, label), ...cells);
  return {element, box, name, cells};
}

function list() {
  const rows = byId("runs"), shown = new Set(visible());
  for (const run of page.runs) {
    if (!page.rows.has(run.id)) page.rows.set(run.id, newRow(run));
    const row = page.rows.get(run.id), [state, update, speed, left, loss, bad] = row.cells;
    row.name.textContent = run.name;
    state.textContent = run.state;
    state.className = `state-${run.state}`;
    update.textContent = run.updates === null ? run.update : `${run.update} / ${run.updates}`;
    speed.textContent = short(run.speed);
    left.textContent = duration(run.left);
    loss.textContent = short(run.loss);
    bad.textContent = run.bad || "";
    row.element.hidden = !shown.has(run);
  }
  const wanted = page.runs.map(run => page.rows.get(run.id).element);
  if (wanted.length !== rows.children.length || wanted.some((one, place) => rows.children[place] !== one))
    rows.replaceChildren(...wanted);
  byId("none").hidden = page.runs.length > 0;
}

async function follow() {
  let seconds = 5;
  try {
    const found = await source.overview(), before = JSON.stringify(page.runs);
    seconds = found.seconds;
    page.runs = found.runs;
    const fresh = found.runs.filter(run => !page.rows.has(run.id));
    fresh.sort((a, b) => (b.state === "running") - (a.state === "running"));
    for (const run of fresh.slice(0, Math.max(0, MOST_CHOSEN - page.chosen.size))) page.chosen.add(run.id);
    byId("place").textContent = `${found.place}${exported ? " (exported)" : ""}`;
    status("");
    list();
    if (JSON.stringify(page.runs) !== before) refresh();
  } catch (error) {
    status(error instanceof TypeError ? "the server does not answer: is tools/runs.py still running?" : error.message);
  }
  if (!exported) setTimeout(whenSeen, seconds * 1000);
}

function whenSeen() {
  if (!document.hidden) follow();
  else document.addEventListener("visibilitychange", whenSeen, {once: true});
}

function open(tab) {
  page.tab = tab;
  for (const name of Object.keys(tabs)) {
    byId(name).hidden = name !== tab;
    byId(`tab-${name}`).setAttribute("aria-selected", name === tab);
    byId(`tab-${name}`).tabIndex = name === tab ? 0 : -1;
  }
  refresh();
}

addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const tab = event.target.closest("[role=tab]"), names = Object.keys(tabs);
  if (tab && ["ArrowLeft", "ArrowRight"].includes(event.key)) {
    const place = names.indexOf(page.tab) + (event.key === "ArrowRight" ? 1 : -1) + names.length;
    open(names[place % names.length]);
    byId(`tab-${page.tab}`).focus();
  } else if (event.target.closest("input:not([type=checkbox]), select, textarea")) {
    if (event.key !== "Escape") return;
    event.target.blur();
  } else if (event.key === "/") byId("filter").focus();
  else if (Object.hasOwn(letters, event.key)) open(letters[event.key]);
  else if (!tabs[page.tab].key?.(event)) return;
  event.preventDefault();
});

for (const [name, tab] of Object.entries(tabs)) {
  tab.start();
  byId(`tab-${name}`).addEventListener("click", () => open(name));
}
byId("filter").addEventListener("input", () => { list(); refresh(); });
byId("all").addEventListener("change", event => {
  const shown = new Set(visible().map(run => run.id)), others = [...page.chosen].filter(id => !shown.has(id));
  choose(event.target.checked ? [...others, ...shown] : others);
});
open("curves");
follow();
