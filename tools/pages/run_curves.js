"use strict";
// Curves of metrics, a chart for each. A curve comes in buckets, as many as a screen can show: the mean is drawn as a
// line, over the range between the lowest and the highest value.

const curves = {
  chosen: new Set(["loss"]), names: new Set(), charts: new Map(), loaded: new Map(), range: null,

  get by() { return byId("by").value; },
  get window() { return [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000][byId("smooth").value]; },

  // The runs that are shown, or what is shown of them, may have changed.
  update(runs) {
    this.runs = runs;
    for (const run of runs) run.metrics.forEach(name => this.names.add(name));
    this.listMetrics();
    for (const [metric, chart] of this.charts)
      if (!this.chosen.has(metric)) { chart.remove(); this.charts.delete(metric); }
    for (const metric of this.chosen) {
      if (!this.charts.has(metric)) this.charts.set(metric, new Chart(metric));
      this.load(metric);
    }
  },

  listMetrics() {
    const listed = byId("metrics");
    const sorted = [...this.names].sort((a, b) => (a.includes("/") - b.includes("/")) || a.localeCompare(b));
    const before = [...listed.querySelectorAll("input")].map(box => box.value);
    if (before.join("\n") === sorted.join("\n")) return;
    const focused = document.activeElement?.value;
    listed.querySelectorAll("label").forEach(label => label.remove());
    for (const name of sorted) {
      const box = make("input", {type: "checkbox", value: name});
      box.checked = this.chosen.has(name);
      box.addEventListener("change", () => {
        if (box.checked) this.chosen.add(name); else this.chosen.delete(name);
        this.update(this.runs);
      });
      listed.append(make("label", {}, box, " ", name));
      if (focused === name) box.focus();
    }
  },

  async load(metric) {
    const by = this.by, range = this.range, most = Math.max(200, Math.min(1200, Math.floor(12000 / this.runs.length)));
    const full = by === "update" ? [0, Math.max(1, ...this.runs.map(run => run.update))] : null;
    const key = JSON.stringify([metric, by, range]);
    const ask = first => Promise.all(this.runs.map(async run => {
      const place = `${run.id} ${key}`, have = this.loaded.get(place);
      if (have?.update === run.update && (first || have.curve?.whole !== false)) return;
      const entry = {update: run.update, curve: have?.curve};
      this.loaded.set(place, entry);
      try {
        entry.curve = await source.curve(run.id, metric, by, most, range ?? full, first);
        const known = this.names.size;
        entry.curve.names?.forEach(name => this.names.add(name));
        if (this.names.size > known) this.listMetrics();
      } catch (error) {
        entry.update = null;  // to be asked for the next time
        status(`${run.name}: ${error.message}`);
      }
      this.charts.get(metric)?.drawSoon();
    }));
    await ask(true);  // what is quick: of long runs, some of their lines
    await ask(false);
    this.charts.get(metric)?.drawSoon();
  },

  curve(run, metric) {
    const entry = this.loaded.get(`${run.id} ${JSON.stringify([metric, this.by, this.range])}`);
    return entry?.curve ?? null;
  },

  zoom(range) {
    this.range = range;
    byId("whole").disabled = range === null;
    for (const place of this.loaded.keys()) if (!place.endsWith(",null]")) this.loaded.delete(place);
    this.update(this.runs);
  },

  redraw() { for (const chart of this.charts.values()) chart.drawSoon(); },

  key(event) {
    const smooth = byId("smooth"), log = byId("log"), by = byId("by");
    const keys = {
      t: () => { by.value = by.value === "time" ? "update" : "time"; by.dispatchEvent(new Event("change")); },
      l: () => { log.checked = !log.checked; this.redraw(); },
      "+": () => { smooth.stepUp(); this.smoothed(); }, "-": () => { smooth.stepDown(); this.smoothed(); },
      Escape: () => this.zoom(null),
    };
    if (!Object.hasOwn(keys, event.key)) return false;
    keys[event.key]();
    return true;
  },

  smoothed() {
    byId("window").textContent = this.window;
    this.redraw();
  },

  start() {
    byId("by").addEventListener("change", () => this.zoom(null));
    byId("smooth").addEventListener("input", () => this.smoothed());
    byId("log").addEventListener("change", () => this.redraw());
    byId("whole").addEventListener("click", () => this.zoom(null));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
    addEventListener("resize", () => this.redraw());
  },
};

// The mean over the last `window` updates of bucket means, each of which counts as often as it has lines.
function smoothed(curve, window) {
  let total = 0, count = 0, first = 0;
  return curve.mean.map((mean, place) => {
    if (mean !== null) { total += mean * curve.count[place]; count += curve.count[place]; }
    while (first < place && count - curve.count[first] >= window) {
      if (curve.mean[first] !== null) { total -= curve.mean[first] * curve.count[first]; count -= curve.count[first]; }
      first += 1;
    }
    return mean === null || !count ? null : total / count;
  });
}

const CLOCK_STEPS = [1, 5, 15, 30, 60, 300, 900, 1800, 3600, 10800, 21600, 43200, 86400, 172800, 604800, 2592000];

// Seconds as H:MM, or H:MM:SS.
function clock(seconds) {
  const two = number => String(number).padStart(2, "0"), minutes = Math.floor(seconds / 60);
  const rest = seconds % 60 ? `:${two(seconds % 60)}` : "";
  return `${Math.floor(minutes / 60)}:${two(minutes % 60)}${rest}`;
}

class Chart {
  constructor(metric) {
    this.metric = metric;
    this.place = make("div", {class: "plot"});
    this.legend = make("ul", {"aria-label": `${metric}: last values`});
    this.element = make("div", {class: "chart"}, make("h2", {}, metric), this.place, this.legend);
    byId("charts").append(this.element);
  }

  remove() {
    this.plot?.destroy();
    this.element.remove();
  }

  drawSoon() {
    this.waiting ??= setTimeout(() => { this.waiting = null; this.draw(); }, 120);
  }

  draw() {
    if (!this.element.isConnected || !this.element.offsetParent) return;
    const drawn = curves.runs.map(run => [run, curves.curve(run, this.metric)]).filter(([, one]) => one?.x.length);
    const log = byId("log").checked, positive = value => (log && !(value > 0) ? null : value);
    const tables = drawn.map(([, one]) => [one.x, ...[one.low, one.high, smoothed(one, curves.window)].map(
      values => values.map(positive))]);
    this.drawn = drawn;
    const data = tables.length ? uPlot.join(tables) : [[]];
    const look = JSON.stringify([drawn.map(([run]) => run.id), log, curves.by, curves.range, ink(), this.place.clientWidth]);
    if (this.plot && this.look === look) this.plot.setData(data);
    else {
      this.plot?.destroy();
      this.look = look;
      this.plot = new uPlot(this.options(drawn, log), data, this.place);
      this.plot.root.setAttribute("role", "img");
    }
    const over = curves.by === "time" ? "time of training" : "updates";
    this.plot.root.setAttribute("aria-label", `${this.metric} of ${drawn.length} runs over ${over}`);
    this.tell(null);
  }

  options(drawn, log) {
    const lines = drawn.flatMap(([run]) => [
      {stroke: null, points: {show: false}}, {stroke: null, points: {show: false}},
      {stroke: colour(run.id), width: 1.5, points: {show: false}},
    ]);
    const axis = {stroke: ink(), grid: {stroke: ink("--line"), width: 0.5}, ticks: {stroke: ink("--line")}};
    const time = curves.by === "time" ? {values: (plot, splits) => splits.map(clock), incrs: CLOCK_STEPS} : {};
    return {
      width: this.place.clientWidth, height: 300, legend: {show: false},
      series: [{}, ...lines],
      bands: drawn.map((one, number) => ({series: [3 * number + 2, 3 * number + 1], fill: colour(one[0].id, 0.25)})),
      scales: {x: {time: false, ...(curves.range ? {min: curves.range[0], max: curves.range[1], auto: false} : {})},
               y: {distr: log ? 3 : 1}},
      axes: [{...axis, ...time}, {...axis, size: 70, values: (plot, splits) => splits.map(short)}],
      cursor: {drag: {x: true, y: false, setScale: false}, points: {show: false}},
      hooks: {
        setCursor: [plot => this.tell(plot.cursor.left >= 0 ? plot.posToVal(plot.cursor.left, "x") : null)],
        setSelect: [plot => {
          const {left, width} = plot.select;
          if (width > 3) curves.zoom([plot.posToVal(left, "x"), plot.posToVal(left + width, "x")]);
        }],
      },
    };
  }

  // The values at x, or the last ones.
  tell(x) {
    this.legend.replaceChildren(...this.drawn.map(([run, one]) => {
      let place = one.x.length - 1;
      if (x !== null) while (place > 0 && one.x[place] > x) place -= 1;
      const at = curves.by === "time" ? duration(one.x[place]) : one.x[place];
      return make("li", {}, swatch(run.id), make("span", {}, run.name), make("span", {}, short(one.mean[place])),
                  make("span", {class: "quiet"}, `at ${at}`));
    }));
  }
}

const ink = (name = "--ink") => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
