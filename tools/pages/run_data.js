"use strict";
// Where the run page has its data from: the server that it came from, or, of an exported page, itself.

const embedded = document.getElementById("data").textContent;
const exported = embedded ? JSON.parse(embedded) : null;

async function ask(address) {
  const answer = await fetch(address), found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  return found;
}

function there(value) {
  if (value === undefined) throw new Error("it is not there");
  return value;
}

const source = exported ? {
  overview: async () => exported,
  details: async id => there(exported.exported[id]).details,
  curve: async (id, metric, by) => {
    const {curves} = there(exported.exported[id]);
    return Object.hasOwn(curves, metric) ? curves[metric][by] : {x: [], low: [], high: [], mean: [], count: []};
  },
  sheet: async (id, update) => there(exported.exported[id].sheets[update]),
} : {
  overview: () => ask("api/runs"),
  details: id => ask(`api/${id}/details`),
  curve: (id, metric, by, buckets, range, first) => {
    const question = new URLSearchParams({metric, by, buckets});
    if (first) question.set("first", "");
    if (range) { question.set("start", range[0]); question.set("end", range[1]); }
    return ask(`api/${id}/curve?${question}`);
  },
  sheet: (id, update) => ask(`api/${id}/sheet/${update}`),
};

const pictureOf = (id, file) => `picture/${id}/${file}`;
const byId = id => document.getElementById(id);

// An element with attributes and children; texts become text, whatever they hold.
function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "";
  const whole = Math.round(seconds), days = Math.floor(whole / 86400), hours = Math.floor(whole / 3600) % 24;
  const minutes = Math.floor(whole / 60) % 60;
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}

function short(number) {
  if (number === null || number === undefined) return "";
  const size = Math.abs(number);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? number.toExponential(2) : String(Number(number.toPrecision(4)));
}

// Colours as far apart as they can be, one after the other.
const colour = (id, opacity = 1) => `hsl(${(id * 137.5 + 210) % 360} 65% 50% / ${opacity})`;

const swatch = id => {
  const made = make("span", {class: "swatch", "aria-hidden": "true"});
  made.style.background = colour(id);
  return made;
};
