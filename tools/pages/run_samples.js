"use strict";
// Sample pictures: runs side by side on the same prompt, weights beside their average, at an update of the slider. A run
// that has no sheet of that update shows its last one before.

const samples = {
  updates: [], sheets: new Map(), turn: 0, timer: null,

  start() {
    this.view = new PictureRows(byId("pictures"), (row, count) => {
      byId("row").textContent = count ? `prompt ${row + 1} / ${count}` : "";
    });
    byId("update").addEventListener("input", () => this.draw());
    byId("play").addEventListener("click", () => this.play());
  },

  update(runs) {
    this.runs = runs;
    const slider = byId("update"), before = this.updates[slider.value], atEnd = slider.value === slider.max;
    this.updates = [...new Set(runs.flatMap(run => run.samples))].sort((a, b) => a - b);
    slider.max = Math.max(0, this.updates.length - 1);
    const place = this.updates.findLastIndex(update => update <= before);
    slider.value = before === undefined || atEnd ? slider.max : Math.max(0, place);
    byId("no-samples").hidden = this.updates.length > 0;
    this.draw();
  },

  step(by) {
    const slider = byId("update");
    slider.value = Number(slider.value) + by;
    this.draw();
  },

  play() {
    const playing = this.timer === null, slider = byId("update");
    if (!playing) clearInterval(this.timer);
    this.timer = playing ? setInterval(() => {
      if (slider.value === slider.max) slider.value = 0; else slider.value = Number(slider.value) + 1;
      this.draw();
    }, 700) : null;
    byId("play").setAttribute("aria-pressed", playing);
    byId("play").textContent = playing ? "Pause" : "Play";
  },

  // What a run has at an update or before: its sheet with the picture loaded, or why there is none.
  sheet(run, update) {
    const at = run.samples.findLast(one => one <= update);
    if (at === undefined) return Promise.resolve({missing: "no samples yet"});
    const key = `${run.id} ${at}`;
    if (!this.sheets.has(key)) this.sheets.set(key, this.load(run, at).catch(error => {
      this.sheets.delete(key);
      return {missing: `update ${at}: ${error.message}`};
    }));
    return this.sheets.get(key);
  },

  async load(run, at) {
    const sheet = await source.sheet(run.id, at), image = new Image();
    image.src = pictureOf(run.id, sheet.file);
    try { await image.decode(); } catch { throw new Error("the picture is gone, or damaged"); }
    return {...sheet, image};
  },

  async draw() {
    const turn = this.turn += 1, update = this.updates[byId("update").value];
    byId("at").textContent = update ?? "";
    byId("update").setAttribute("aria-valuetext", `update ${update ?? "none"}`);
    if (byId("samples").hidden) return;
    const runs = update === undefined ? [] : this.runs.filter(run => run.samples.length);
    const found = await Promise.all(runs.map(run => this.sheet(run, update)));
    if (turn !== this.turn) return;  // the slider went on meanwhile
    byId("pictures").replaceChildren(...this.rows(runs, found));
    this.view.show(this.view.row);
  },

  // A section for each prompt, with figures of each run that has it: the weights', and their average's.
  rows(runs, found) {
    const prompts = new Map();  // prompt: the cells of each run
    const kinds = found.map(sheet => new Set(sheet.cells?.map(cell => parted(cell[0]).column)));
    found.forEach((sheet, place) => {
      for (const cell of sheet.cells ?? (sheet.image ? [null] : [])) {
        const {column, prompt} = cell ? parted(cell[0]) : {column: "", prompt: "the whole sheet"};
        if (!cell) kinds[place].add("");
        if (!prompts.has(prompt)) prompts.set(prompt, runs.map(() => new Map()));
        prompts.get(prompt)[place].set(column, cell);
      }
    });
    if (!prompts.size && runs.length) prompts.set("", runs.map(() => new Map()));
    const columns = runs.flatMap((run, place) => [...(kinds[place].size ? kinds[place] : [""])].map(one => [run, place, one]));
    const sections = [...prompts].map(([prompt, cells]) => {
      const figures = columns.map(([run, place, column], number) => {
        const sheet = found[place], about = [run.name, column, sheet.update].filter(Boolean).join(" · ");
        const figure = make("figure", {"data-folder": number});
        if (sheet.missing) {
          figure.classList.add("missing");
          figure.append(make("p", {}, sheet.missing));
        } else if (cells[place].has(column)) figure.append(cut(sheet.image, cells[place].get(column), `${about}: ${prompt}`));
        else return null;
        figure.append(make("figcaption", {}, swatch(run.id), `${number + 1}: ${about}`));
        return figure;
      });
      const heading = make("h2", {}, prompt || "(no caption)");
      return make("section", {}, heading, make("div", {class: "pictures"}, ...figures.filter(Boolean)));
    });
    if (found.some(sheet => sheet.clip)) sections.push(this.moving(runs, found));
    return sections;
  },

  moving(runs, found) {
    const figures = runs.map((run, place) => {
      const clip = found[place].clip, figure = make("figure", {"data-folder": place});
      if (clip) figure.append(make("video", {
        src: pictureOf(run.id, clip), controls: "", loop: "", "aria-label": `${run.name}: all prompts, moving`}));
      else { figure.classList.add("missing"); figure.append(make("p", {}, "no clip")); }
      figure.append(make("figcaption", {}, swatch(run.id), `${place + 1}: ${run.name}`));
      return figure;
    });
    figures.forEach(figure => figure.querySelectorAll("video").forEach(video => { video.muted = true; }));
    return make("section", {}, make("h2", {}, "all prompts, moving"), make("div", {class: "pictures"}, ...figures));
  },

  key(event) {
    if (event.key === "ArrowDown") this.step(1);
    else if (event.key === "ArrowUp") this.step(-1);
    else if (event.key === "p") this.play();
    else return this.view.key(event);
    return true;
  },
};

// `NAME: PROMPT`, or of an average `NAME (EMA): PROMPT`, as sheets have it.
function parted(caption) {
  const [, column, prompt] = /^(.*?): (.*)$/s.exec(caption) ?? [null, "", caption];
  return {column, prompt};
}

// A part of a picture, or all of it, on a canvas of its size.
function cut(image, cell, label) {
  const [, left, top, width, height] = cell ?? ["", 0, 0, image.naturalWidth, image.naturalHeight];
  const canvas = make("canvas", {width: Math.min(width, 8192), height: Math.min(height, 8192), role: "img", "aria-label": label});
  if (Math.max(width, height) <= 256) canvas.classList.add("small");
  canvas.getContext("2d").drawImage(image, left, top, canvas.width, canvas.height, 0, 0, canvas.width, canvas.height);
  return canvas;
}
