"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const {rows, about} = data, count = rows.key.length;
const SIZES = `bucket, ${(rows.texts.bucket[0] ?? "").split("x").length > 2 ? "frames x " : ""}height x width in px`;
const ROW_PX = 28, GROUPS = 100, MANY = 50;
const sampleOf = new Map(data.samples.map(one => [one.row, one]));
const cutOf = new Map(data.cut.map(one => [one.row, one.place]));
const unreadable = new Map(data.unreadable.map(one => [one.row, one.reason]));
const dropped = new Set(data.dropped);
const drawn = rows.texts.state.indexOf("drawn");
const byId = name => document.getElementById(name);

function make(tag, about = {}, ...children) {  // texts stay texts: nothing here reads HTML
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(about)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && name !== "role") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter(child => child !== null && child !== undefined && child !== ""));
  return made;
}

const number = value => value.toLocaleString("en");
const percent = share => `${Math.round(100 * share)}%`;
const place = row => `${rows.shards[rows.shard[row]]}/${rows.key[row]}`;
const bucketOf = row => rows.bucket[row] < 0 ? "" : rows.texts.bucket[rows.bucket[row]];
const stateOf = row => unreadable.has(row) ? "unreadable" : rows.texts.state[rows.state[row]];

// ------------------------------------------------------------------ which rows

const kinds = [
  ["every row", () => true],
  ["drawn", row => rows.state[row] === drawn],
  ["left out", row => rows.state[row] !== drawn],
  ["enlarged to their bucket", row => rows.scale[row] > 1],
  ["caption cut off", row => cutOf.has(row)],
  ["caption left out in this draw", row => dropped.has(row)],
  ["unreadable", row => unreadable.has(row)],
  ...rows.texts.state.map((text, state) => [text, row => rows.state[row] === state]).filter(([, ], i) => i !== drawn),
];
let haystack = null, found = [], current = 0;

function textOf(row) {
  const values = data.columns.map(({values}) => typeof values[row] === "string" ? values[row] : "");
  return [rows.key[row], rows.caption[row] ?? "", ...values].join("\n").toLowerCase();
}

function select() {
  const words = byId("search").value.toLowerCase().trim();
  if (words && !haystack) haystack = Array.from({length: count}, (_, row) => textOf(row));
  const test = kinds[byId("which").value][1], bucket = Number(byId("bucket").value);
  const column = numeric[byId("column").value];
  const [least, most] = ["least", "most"].map(name => byId(name).value === "" ? null : Number(byId(name).value));
  found = [];
  for (let row = 0; row < count; row++) {
    if (!test(row) || (bucket >= 0 && rows.bucket[row] !== bucket)) continue;
    if (column && (least !== null || most !== null)) {
      const value = column.values[row];
      if (value === null || (least !== null && value < least) || (most !== null && value > most)) continue;
    }
    if (!words || haystack[row].includes(words)) found.push(row);
  }
  byId("found").textContent = `${number(found.length)} of ${number(count)} rows`;
  current = 0;
}

const isNumber = ({values}) => values.some(value => typeof value === "number");
const measured = [["width", rows.width], ["height", rows.height], ["enlarged, times", rows.scale],
  ["kept by the crop", rows.kept]].map(([name, values]) => ({name, values}));
const numeric = [null, ...measured, ...data.columns.filter(isNumber)];

function fill(name, options) {
  byId(name).append(...options.map(([value, text]) => make("option", {value, textContent: text})));
}

// ------------------------------------------------------------------ a sample

function whole(uri, box, label) {
  const inside = [make("img", {src: uri, alt: label, loading: "lazy"})];
  if (box) {
    const [left, top, right, bottom] = box, crop = make("div", {className: "crop"});
    Object.assign(crop.style, {
      left: percentage(left), top: percentage(top), width: percentage(right - left), height: percentage(bottom - top),
    });
    inside.push(crop);
  }
  return make("span", {className: "whole"}, ...inside);
}
const percentage = share => `${(100 * share).toFixed(2)}%`;

function caption(row) {
  const text = rows.caption[row];
  if (text === null || text === undefined) return null;
  const made = make("p", {className: "caption"});
  if (dropped.has(row)) made.append(make("span", {className: "dropped", textContent: text}), " (left out in this draw)");
  else if (cutOf.has(row))
    made.append(text.slice(0, cutOf.get(row)), make("span", {className: "lost", textContent: text.slice(cutOf.get(row))}));
  else made.textContent = text || "(empty)";
  return made;
}

function pictures(sample, row) {
  const name = rows.key[row];
  if (!sample.crop) return [make("p", {className: "bad", textContent: sample.problem})];
  const shown = sample.clip
    ? make("video", {className: "shown", src: sample.clip, controls: true, loop: true, muted: true, preload: "auto",
        "aria-label": `clip of ${name}`})
    : make("img", {className: "shown", src: sample.crop, alt: `crop of ${name}`, loading: "lazy"});
  const parts = [make("figure", {}, whole(sample.whole, sample.box, `whole picture of ${name}`),
    make("figcaption", {textContent: "whole"}))];
  for (const [kind, uri] of Object.entries(sample.beside))
    parts.push(make("figure", {}, make("img", {src: uri, alt: `${kind} of ${name}`, loading: "lazy"}),
      make("figcaption", {textContent: kind})));
  const note = sample.frames && !sample.clip ? "the clip is too large for this page: its first frame" : "";
  return [shown, note && make("p", {className: "small quiet", textContent: note}),
    make("div", {className: "parts"}, ...parts)];
}

function facts(row) {
  const enlarged = rows.scale[row] > 1 ? `, enlarged ${rows.scale[row]} times` : "";
  const kept = rows.kept[row] === null ? "" : `, ${percent(rows.kept[row])} kept`;
  const frames = sampleOf.get(row)?.frames ? `, ${sampleOf.get(row).frames} frames` : "";
  const size = rows.width[row] ? `${rows.width[row]} x ${rows.height[row]} px` : "size unknown";
  return size + frames + enlarged + kept;
}

function card(row) {
  const open = make("button", {className: "link key", textContent: rows.key[row], onclick: () => detail(row)});
  return make("article", {className: "card"}, ...pictures(sampleOf.get(row), row), open,
    make("div", {className: "small quiet", textContent: facts(row)}), caption(row));
}

function detail(row) {
  const dialog = byId("detail"), sample = sampleOf.get(row), table = make("table");
  const lines = [
    ["tar", rows.shards[rows.shard[row]]], ["members", rows.texts.members[rows.members[row]]], ["state", stateOf(row)],
    ["why", unreadable.get(row) ?? rows.problem[row]], ["picture", facts(row)], [SIZES, bucketOf(row)],
    ["caption in the tar", sample && sample.own !== rows.caption[row] ? sample.own : undefined],
    ...data.columns.map(({name, values}) => [name, values[row]]),
  ];
  for (const [name, value] of lines)
    if (value !== null && value !== undefined && value !== "")
      table.append(make("tr", {}, make("th", {textContent: name, scope: "row"}), make("td", {textContent: String(value)})));
  dialog.replaceChildren(
    make("div", {className: "bar"}, make("h2", {className: "grow", textContent: rows.key[row]}),
      make("button", {textContent: "Close", onclick: () => dialog.close()})),
    ...(sample ? pictures(sample, row).filter(Boolean)
      : data.thumbs[row] ? [whole(data.thumbs[row], null, `whole picture of ${rows.key[row]}`)]
      : [make("p", {className: "quiet", textContent: "Not among the samples whose pictures this page holds."})]),
    ...[caption(row)].filter(Boolean), table);
  dialog.showModal();
}

// ------------------------------------------------------------------ tabs

function samples() {
  const own = found.filter(row => sampleOf.has(row)), made = [];
  for (const [i, name] of rows.texts.bucket.entries()) {
    const inside = own.filter(row => rows.bucket[row] === i);
    if (inside.length)
      made.push(make("h2", {textContent: `${SIZES}: ${name}, ${inside.length} shown, ` +
        `${number(data.buckets.find(one => one.name === name)?.draws ?? 0)} drawn in an epoch`}),
        make("div", {className: "cards"}, ...inside.map(card)));
  }
  if (data.samples.some(one => one.clip))
    made.unshift(make("button", {id: "play", textContent: "Play all clips", onclick: playAll}));
  return made.length ? made : [make("p", {className: "quiet", textContent: about.drawn
    ? "None of the samples with pictures." : 'No row is drawn: "Left out" says why.'})];
}

function playAll() {
  const videos = [...document.querySelectorAll("main video")], stop = videos.some(video => !video.paused);
  for (const video of videos) stop ? video.pause() : video.play();
}

const HEAD = ["row", "key", "width x height", "bucket", "resized", "kept", "state", "caption"];

function list() {
  const all = make("div", {className: "all"}), box = make("div", {id: "list", tabIndex: 0, role: "grid",
    "aria-label": "Rows: arrow keys to move, Enter to open", "aria-rowcount": found.length + 1}, all);
  const head = make("div", {className: "row head", role: "row"},
    ...HEAD.map(text => make("span", {role: "columnheader", textContent: text})));
  const visible = make("div");
  all.append(head, visible);
  all.style.height = `${(found.length + 1) * ROW_PX}px`;
  function line(i) {
    const row = found[i], times = rows.scale[row], kept = rows.kept[row];
    const cells = [row, rows.key[row], rows.width[row] ? `${rows.width[row]} x ${rows.height[row]}` : "", bucketOf(row),
      times === null ? "" : times.toFixed(2), kept === null ? "" : percent(kept), stateOf(row), rows.caption[row] ?? ""];
    const made = make("div", {id: `row-${i}`, className: i === current ? "row current" : "row", role: "row", "aria-rowindex": i + 2,
      onclick: () => { current = i; draw(); detail(row); }},
      ...cells.map(text => make("span", {role: "gridcell", textContent: String(text).slice(0, 300)})));
    made.style.top = `${(i + 1) * ROW_PX}px`;
    return made;
  }
  function draw() {
    const first = Math.max(0, Math.floor(box.scrollTop / ROW_PX) - 10);
    const last = Math.min(found.length, first + Math.ceil((box.clientHeight || 800) / ROW_PX) + 20);
    box.setAttribute("aria-activedescendant", `row-${current}`);
    visible.replaceChildren(...Array.from({length: Math.max(0, last - first)}, (_, i) => line(first + i)));
  }
  function move(to) {
    current = Math.min(Math.max(to, 0), found.length - 1);
    const top = current * ROW_PX, room = box.clientHeight - 2 * ROW_PX;
    if (box.scrollTop > top) box.scrollTop = top;
    if (box.scrollTop < top - room) box.scrollTop = top - room;
    draw();
  }
  box.addEventListener("scroll", () => requestAnimationFrame(draw));
  const page = () => Math.floor(box.clientHeight / ROW_PX) - 2;
  const keys = {
    ArrowDown: () => move(current + 1), ArrowUp: () => move(current - 1), PageDown: () => move(current + page()),
    PageUp: () => move(current - page()), Home: () => move(0), End: () => move(found.length - 1),
    Enter: () => found.length && detail(found[current]),
  };
  box.addEventListener("keydown", event => {
    if (!Object.hasOwn(keys, event.key)) return;
    keys[event.key]();
    event.preventDefault();
  });
  requestAnimationFrame(draw);
  draw();
  return [box];
}

function leftOut() {
  const made = [];
  for (const {reason, count, examples} of data.left_out) {
    const show = make("button", {textContent: "show these rows", onclick: () => only(reason)});
    made.push(make("div", {className: "bar"}, make("h2", {textContent: `${number(count)}: ${reason}`}), show),
      make("div", {className: "cards"}, ...examples.map(({row, whole: uri, problem}) => make("article",
        {className: "card"}, uri ? whole(uri, null, `whole picture of ${rows.key[row]}`)
          : make("p", {className: "bad", textContent: problem}),
        make("div", {}, make("button", {className: "link key", textContent: rows.key[row], onclick: () => detail(row)})),
        make("div", {className: "small quiet", textContent: facts(row)})))));
  }
  return made.length ? made : [make("p", {textContent: "Every row that is listed is drawn."})];
}

function only(name) {
  byId("which").value = kinds.findIndex(([text]) => text === name);
  select();
  show("rows");
}

function bars(entries) {
  const most = Math.max(1, ...entries.map(([, every]) => every)), box = make("div", {className: "bars"});
  for (const [label, every, some] of entries) {
    const parts = [every, ...(some === undefined ? [] : [some])].map(value => {
      const bar = make("i");
      bar.style.width = percentage(value / most);
      return bar;
    });
    box.append(make("span", {className: "label", textContent: label || "(empty)"}),
      make("span", {className: "track"}, ...parts),
      make("span", {className: "number", textContent: some === undefined || some === every ? number(every)
        : `${number(some)} of ${number(every)}`}));
  }
  return box;
}

function columns() {
  return [make("p", {className: "quiet", textContent: "Rows by value; in colour those that are drawn."}),
    make("div", {className: "columns"}, ...data.histograms.map(({name, absent, bars: entries}) => make("section", {},
      make("h2", {textContent: name + (absent ? ` (absent from ${number(absent)} rows)` : "")}), bars(entries))))];
}

function buckets() {
  const table = make("table", {}, make("tr", {}, ...[SIZES, "draws in an epoch", "micro-batch", ""].map(
    text => make("th", {textContent: text, scope: "col"}))));
  for (const {name, draws, micro_batch: micro, few} of data.buckets)
    table.append(make("tr", {}, make("td", {textContent: name}), make("td", {className: "number", textContent: number(draws)}),
      make("td", {className: "number", textContent: number(micro)}), make("td", {className: "busy", textContent: few ?? ""})));
  return [table, make("h2", {textContent: "Draws in an epoch"}), bars(data.buckets.map(one => [one.name, one.draws])),
    make("p", {}, `${number(rows.scale.filter(times => times > 1).length)} pictures are smaller than their bucket, and enlarged: `,
      make("button", {textContent: "show these rows", onclick: () => only("enlarged to their bucket")}))];
}

function duplicates() {
  const made = [make("p", {className: "quiet", textContent: `Groups of pictures that look the same: ` +
    `${number(data.duplicates.length)}, among the ${number(about.read)} that were read.`})];
  for (const group of data.duplicates.slice(0, GROUPS)) {
    const shown = group.slice(0, 12).map(row => {
      const uri = data.thumbs[row] ?? sampleOf.get(row)?.whole;
      return make("article", {className: "card"}, uri ? whole(uri, null, `whole picture of ${rows.key[row]}`) : null,
        make("div", {}, make("button", {className: "link key", textContent: place(row), onclick: () => detail(row)})));
    });
    made.push(make("h2", {textContent: `${number(group.length)} alike`}), make("div", {className: "cards"}, ...shown));
  }
  if (data.duplicates.length > GROUPS) made.push(make("p", {textContent: `The first ${GROUPS} groups are shown.`}));
  return made;
}

function problems() {
  const made = [make("h2", {textContent: `Captions that the text encoder cuts off: ${number(data.cut.length)}`})];
  const items = (entries, inside) => entries.slice(0, 4 * MANY).map(one => make("article", {className: "card"},
    make("button", {className: "link key", textContent: place(one.row), onclick: () => detail(one.row)}), inside(one)));
  made.push(...items(data.cut, one => caption(one.row)));
  made.push(make("h2", {textContent: `Samples that can't be read: ${number(data.unreadable.length)}`}));
  made.push(...items(data.unreadable, one => make("p", {className: "bad", textContent: one.reason})));
  const most = Math.max(data.cut.length, data.unreadable.length);
  if (most > 4 * MANY) made.push(make("p", {textContent: `The first ${4 * MANY} of each are shown; "${kinds[4][0]}" finds all.`}));
  return made;
}

const tabs = {
  samples: [`Samples (${number(data.samples.length)})`, samples, true],
  rows: [`Rows (${number(count)})`, list, true],
  leftout: [`Left out (${number(data.left_out.reduce((sum, one) => sum + one.count, 0))})`, leftOut],
  columns: [`Columns (${data.histograms.length})`, columns],
  buckets: [`Buckets (${data.buckets.length})`, buckets],
  duplicates: [`Duplicates (${number(data.duplicates.length)})`, duplicates],
  problems: [`Cut or unreadable (${number(data.cut.length + data.unreadable.length)})`, problems],
};
let shown = "samples";

function show(name) {
  shown = name;
  for (const tab of document.querySelectorAll("[role=tab]")) {
    tab.setAttribute("aria-selected", tab.id === `tab-${name}`);
    tab.tabIndex = tab.id === `tab-${name}` ? 0 : -1;
  }
  byId("filter").hidden = !tabs[name][2];
  byId("main").setAttribute("aria-labelledby", `tab-${name}`);
  byId("main").replaceChildren(...tabs[name][1]());
}

function start() {
  document.title = `${data.title} - data set`;
  byId("title").textContent = data.title;
  byId("summary").textContent = `${number(about.rows)} rows in ${number(about.looked_at)} of ${number(about.shards)} tars; ` +
    `${number(about.listed)} listed here, ${number(about.drawn)} of them drawn in the first epoch; captions and pictures of ` +
    `${number(about.read)} read, ${number(about.shown)} shown as training sees them.`;
  byId("told").querySelector("summary").textContent = `What was looked at, and what a run would say (${data.told.length})`;
  byId("told").querySelector("ul").append(...data.told.map(text => make("li", {textContent: text})));
  byId("told").open = data.told.length < 4;
  byId("main").setAttribute("role", "tabpanel");
  for (const [name, [label]] of Object.entries(tabs))
    byId("tabs").append(make("button", {id: `tab-${name}`, role: "tab", textContent: label, onclick: () => show(name)}));
  byId("tabs").addEventListener("keydown", event => {
    const names = Object.keys(tabs), step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (!step) return;
    show(names[(names.indexOf(shown) + step + names.length) % names.length]);
    byId(`tab-${shown}`).focus();
  });
  fill("which", kinds.map(([text], i) => [i, text]));
  fill("bucket", [[-1, "every bucket"], ...rows.texts.bucket.map((text, i) => [i, `${text} px`])]);
  fill("column", numeric.map((column, i) => [i, column ? column.name : "every value"]));
  let waiting = 0;
  byId("filter").addEventListener("input", () => {
    for (const name of ["least", "most"]) byId(name).hidden = byId("column").value === "0";
    clearTimeout(waiting);
    waiting = setTimeout(() => { select(); show(shown); }, 100);
  });
  byId("filter").addEventListener("submit", event => event.preventDefault());
  addEventListener("keydown", event => {
    if (event.key !== "/" || /INPUT|SELECT|TEXTAREA/.test(document.activeElement.tagName) || byId("filter").hidden) return;
    byId("search").focus();
    event.preventDefault();
  });
  select();
  show("samples");
}
start();
