"use strict";
// Rows of pictures side by side: sections in a view, each with figures, whose data-folder is the number of what is
// compared. One row is shown, or all of them (class list); all figures of it, or one alone; fitted, or in real size.

class PictureRows {
  constructor(view, moved = () => {}) {
    Object.assign(this, {view, moved, row: 0, alone: null});  // alone: the folder that is shown by itself, else null
    view.addEventListener("click", event => {
      const figure = event.target.closest("figure");
      if (!figure || !view.contains(figure) || event.target.closest("video, button, a")) return;
      this.alone = this.alone === null ? Number(figure.dataset.folder) : null;
      this.show(this.rows.indexOf(figure.closest("section")));
    });
  }

  get rows() { return [...this.view.querySelectorAll("section")]; }

  get folders() {
    const numbers = [...this.view.querySelectorAll("figure")].map(figure => Number(figure.dataset.folder));
    return numbers.reduce((most, number) => Math.max(most, number + 1), 0);
  }

  show(place) {
    const rows = this.rows, before = this.row;
    this.row = Math.max(Math.min(place, rows.length - 1), 0);
    rows.forEach((one, number) => one.classList.toggle("current", number === this.row));
    this.view.classList.toggle("alone", this.alone !== null);
    for (const figure of this.view.querySelectorAll("figure"))
      figure.classList.toggle("shown", Number(figure.dataset.folder) === this.alone);
    if (this.row !== before && this.view.classList.contains("list")) rows[this.row].scrollIntoView({block: "nearest"});
    this.moved(this.row, rows.length);
  }

  only(folder) { this.alone = folder; this.show(this.row); }

  flip(step) {
    const folders = this.folders;
    this.only(this.alone === null ? (step > 0 ? 0 : folders - 1) : (this.alone + step + folders) % folders);
  }

  toggle(...names) {
    names.forEach(name => this.view.classList.toggle(name));
    this.show(this.row);
  }

  // Whether a key was one of these.
  key(event) {
    const keys = {
      ArrowRight: () => this.show(this.row + 1), ArrowLeft: () => this.show(this.row - 1),
      Home: () => this.show(0), End: () => this.show(this.rows.length - 1),
      0: () => this.only(null), Escape: () => this.only(null),
      a: () => this.toggle("one", "list"), z: () => this.toggle("real"),
    };
    const digit = /^[1-9]$/.test(event.key) && Number(event.key);
    if (digit && digit <= this.folders) this.only(digit - 1);
    else if (Object.hasOwn(keys, event.key)) keys[event.key]();
    else return false;
    return true;
  }
}
