"use strict";
// What configurations say, and what runs told people.

const details = {
  known: new Map(),

  // Of a run as it is now.
  async of(run) {
    const have = this.known.get(run.id);
    if (have?.update !== run.update || have?.state !== run.state) {
      this.known.set(run.id, {update: run.update, state: run.state, found: source.details(run.id)});
    }
    try { return await this.known.get(run.id).found; } catch (error) {
      this.known.delete(run.id);
      return {config: {}, notes: [], problem: error.message, command: null};
    }
  },
};

const differences = {
  start() { for (const id of ["left", "right", "equal"]) byId(id).addEventListener("change", () => this.draw()); },

  update(runs) {
    const same = this.runs?.map(run => run.id).join() === runs.map(run => run.id).join();
    this.runs = runs;
    if (!same) for (const [place, id] of ["left", "right"].entries()) {
      const select = byId(id), before = select.value;
      select.replaceChildren(...runs.map(run => make("option", {value: run.id}, run.name)));
      select.value = runs.some(run => String(run.id) === before) ? before : runs[Math.min(place, runs.length - 1)]?.id ?? "";
    }
    if (byId("left").value === byId("right").value && runs.length > 1 && !same) byId("right").selectedIndex = 1;
    this.draw();
  },

  async draw() {
    if (byId("differences").hidden) return;
    const runs = ["left", "right"].map(id => this.runs.find(run => String(run.id) === byId(id).value));
    if (runs.some(run => !run)) {
      byId("keys").replaceChildren();
      byId("differing").textContent = "choose runs in the list above";
      return;
    }
    const found = await Promise.all(runs.map(run => details.of(run)));
    const [left, right] = found.map(one => one.config), has = (config, key) => Object.hasOwn(config, key);
    const keys = [...new Set([...Object.keys(left), ...Object.keys(right)])];
    const differing = keys.filter(key => has(left, key) !== has(right, key) || left[key] !== right[key]);
    const cell = (config, key) => make("td", has(config, key) ? {} : {class: "quiet"}, has(config, key) ? config[key] : "no such key");
    byId("keys").replaceChildren(...(byId("equal").checked ? keys : differing).map(key => make("tr", {},
      make("th", {scope: "row"}, key), cell(left, key), cell(right, key))));
    byId("left-name").textContent = runs[0].name;
    byId("right-name").textContent = runs[1].name;
    const problems = found.map((one, place) => one.problem && `${runs[place].name}: ${one.problem}`).filter(Boolean);
    byId("differing").textContent = [`${differing.length} of ${keys.length} keys differ`, ...problems].join("; ");
  },
};

const notes = {
  start() {
    byId("find").addEventListener("input", () => this.draw());
    byId("bad").addEventListener("change", () => this.draw());
  },

  update(runs) {
    this.runs = runs;
    this.draw();
  },

  async draw() {
    if (byId("notes").hidden) return;
    const runs = this.runs, found = await Promise.all(runs.map(run => details.of(run)));
    const sought = byId("find").value.toLowerCase(), bad = byId("bad").checked;
    const wanted = note => note.text.toLowerCase().includes(sought) && (!bad || /^bad (validation )?sample /.test(note.text));
    const told = runs.map((run, place) => this.block(run, found[place], found[place].notes.filter(wanted)));
    const focused = document.activeElement?.dataset?.copy;
    byId("told").replaceChildren(...told);
    if (!told.length) byId("told").append(make("p", {class: "quiet"}, "Choose runs in the list above."));
    if (focused) byId("told").querySelector(`[data-copy="${focused}"]`)?.focus();
  },

  block(run, found, listed) {
    const block = make("div", {class: "run-notes"}, make("h2", {}, swatch(run.id), run.name));
    const state = make("p", {}, make("span", {class: `state-${run.state}`}, run.state));
    if (run.bad) state.append(`, ${run.bad} bad samples`);
    if (found.strange) state.append(`, ${found.strange} lines of metrics.jsonl that no run wrote`);
    if (found.samples_elsewhere) state.append(`, samples are in ${found.samples_elsewhere}, which this page does not show`);
    if (found.problem) state.append(`, ${found.problem}`);
    block.append(state, make("p", {class: "quiet"}, found.command ? (run.state === "finished" ?
      "It made its last update. This starts it again, with a larger number of updates at its end (updates=N):" :
      "To go on from its last checkpoint:") :
      "No command was kept. To go on from its last checkpoint, name its script in place of SCRIPT:"));
    const copy = make("button", {"data-copy": run.id, "aria-label": `Copy the command of ${run.name}`}, "Copy");
    const command = found.command ?? `python3 train/SCRIPT.py ${found.config_path ?? ""}`;
    copy.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(command);
        copy.textContent = "Copied";
      } catch {  // the browser has no clipboard for this page
        getSelection().selectAllChildren(block.querySelector("pre"));
        copy.textContent = "Selected: press Ctrl+C";
      }
    });
    block.append(make("pre", {}, command), copy);
    block.append(make("ul", {"aria-label": `Notes of ${run.name}`}, ...listed.toReversed().map(note => make("li",
      note.state === "failed" ? {class: "bad"} : {},
      make("span", {class: "quiet"}, `${note.time ?? ""} update ${note.update ?? "?"}: `), note.text))));
    if (!listed.length) block.append(make("p", {class: "quiet"}, found.notes.length ? "No such note." : "It kept no notes."));
    return block;
  },
};
