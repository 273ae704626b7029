"use strict";
// Everything is in the page already: this filters, zooms, and opens what the address points at.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const form = document.querySelector("form");

function filter() {
  const words = form.search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const levels = new Set(all("input[name=severity]:checked", form).map((box) => box.value));
  let shown = 0;
  for (const finding of all("details.finding")) {
    const text = finding.textContent.toLowerCase();
    const fits = levels.has(finding.dataset.severity)
      && (!form.rule.value || finding.dataset.rule === form.rule.value)
      && (!form.target.value || finding.dataset.target === form.target.value)
      && (!form.state.value || finding.dataset.state === form.state.value)
      && words.every((word) => text.includes(word));
    finding.hidden = !fits;
    shown += fits;
  }
  document.getElementById("shown").textContent = shown;
}

function zoomable(graph) {
  const svg = graph.querySelector("svg");
  const whole = svg.getAttribute("viewBox").split(" ").map(Number);
  let box = [...whole];
  const show = () => svg.setAttribute("viewBox", box.join(" "));
  const zoom = (factor, x = 0.5, y = 0.5) => {
    const width = Math.min(whole[2] * 2, Math.max(whole[2] / 20, box[2] * factor));
    const height = width * whole[3] / whole[2];
    box = [box[0] + (box[2] - width) * x, box[1] + (box[3] - height) * y, width, height];
    show();
  };
  const steps = { in: () => zoom(0.75), out: () => zoom(1 / 0.75), whole: () => { box = [...whole]; show(); } };
  for (const button of all("button", graph)) button.addEventListener("click", steps[button.dataset.zoom]);
  svg.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return; // a plain wheel scrolls the page
    event.preventDefault();
    const area = svg.getBoundingClientRect();
    zoom(event.deltaY > 0 ? 1.15 : 1 / 1.15, (event.clientX - area.left) / area.width, (event.clientY - area.top) / area.height);
  }, { passive: false });
  let last = null;
  svg.addEventListener("pointerdown", (event) => { last = [event.clientX, event.clientY]; svg.setPointerCapture(event.pointerId); });
  svg.addEventListener("pointerup", () => { last = null; });
  svg.addEventListener("pointercancel", () => { last = null; });
  svg.addEventListener("pointermove", (event) => {
    if (!last) return;
    const area = svg.getBoundingClientRect();
    const scale = Math.max(box[2] / area.width, box[3] / area.height);
    box = [box[0] - (event.clientX - last[0]) * scale, box[1] - (event.clientY - last[1]) * scale, box[2], box[3]];
    last = [event.clientX, event.clientY];
    show();
  });
}

function follow() {
  const place = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!place) return;
  place.hidden = false;
  if (place.tagName === "DETAILS") place.open = true;
  place.scrollIntoView();
}

form.addEventListener("input", filter);
form.addEventListener("change", filter);
form.addEventListener("submit", (event) => event.preventDefault());
document.getElementById("unfold").addEventListener("click", () => {
  const cards = all("details.finding");
  const open = cards.some((card) => !card.open);
  for (const card of cards) card.open = open;
});
all(".graph").forEach(zoomable);
addEventListener("hashchange", follow);
filter();
follow();
