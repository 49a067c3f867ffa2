"use strict";
// Pictures of folders side by side, all of them in the page. Its address tells the place: #ROW, or #ROW.FOLDER

const view = new PictureRows(document.body, (row, count) => {
  document.getElementById("place").textContent = `${row + 1} / ${count}`;
  location.replace("#" + (row + 1) + (view.alone === null ? "" : "." + (view.alone + 1)));
});

function samePrompt(step) {  // the place of the same prompt in the next update that has it
  const rows = view.rows, prompt = rows[view.row].dataset.prompt;
  for (let place = view.row + step; rows[place]; place += step)
    if (rows[place].dataset.prompt === prompt) return place;
  return view.row;
}

const keys = {
  ArrowDown: () => view.show(samePrompt(1)), ArrowUp: () => view.show(samePrompt(-1)),
  Tab: event => view.flip(event.shiftKey ? -1 : 1),
};

function read() {
  const [place, folder] = location.hash.slice(1).split(".").map(Number);
  view.alone = folder >= 1 && folder <= view.folders ? folder - 1 : null;
  view.show((place || 1) - 1);
}

addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (Object.hasOwn(keys, event.key)) keys[event.key](event);
  else if (!view.key(event)) return;
  event.preventDefault();
});
addEventListener("hashchange", read);
document.body.classList.replace("list", "one");
read();
