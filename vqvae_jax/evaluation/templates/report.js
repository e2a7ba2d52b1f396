
"use strict";
const settings = JSON.parse(document.getElementById("settings").textContent);
const byId = (id) => document.getElementById(id);
const gallery = byId("gallery");
const view = {};

function greys(image) {
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height).data.filter((_, index) => index % 4 === 0);
}

function paint(canvas, colourOf) {
  const context = canvas.getContext("2d", { willReadFrequently: true }); // pixels are made here, not on a GPU
  const pixels = context.createImageData(canvas.width, canvas.height);
  const words = new Uint32Array(pixels.data.buffer);
  for (let index = 0; index < words.length; index++) words[index] = colourOf(index);
  context.putImageData(pixels, 0, 0);
}

// Little-endian RGBA, which is what every browser's platform has.
const word = (red, green, blue) => ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;

function tables() {
  const level = (value) => {
    const low = view.level / 100 - view.window / 200;
    return Math.max(0, Math.min(255, Math.round((255 * (value / 255 - low)) / (view.window / 100))));
  };
  view.grey = Uint32Array.from({ length: 256 }, (_, value) => word(level(value), level(value), level(value)));
  view.colour = Uint32Array.from({ length: 256 }, (_, value) =>
    word(...settings.colours[Math.min(255, Math.round((value * 100) / view.limit))]));
}

class Slice {
  constructor(card) {
    this.card = card;
    this.split = card.querySelector(".split");
    const [compare, difference] = card.querySelectorAll(".stage");
    this.original = compare.querySelector(".original");
    this.reconstruction = compare.querySelector(".reconstruction");
    const name = card.querySelector("h3").firstChild.textContent.trim();
    this.compared = this.canvas(compare, `Original left and reconstruction right of the line: ${name}`);
    this.differing = this.canvas(difference, `Absolute difference of original and reconstruction: ${name}`);
    this.divider = this.add(compare, "div", "divider", "");
    this.left = this.add(compare, "span", "tag left", "original");
    this.right = this.add(compare, "span", "tag right", "reconstruction");
    this.add(difference, "span", "tag left", "absolute difference");
    this.split.addEventListener("input", () => this.drawCompared());
    for (const button of card.querySelectorAll("[data-split]"))
      button.addEventListener("click", () => this.move(Number(button.dataset.split)));
    const drag = (event) => {
      const box = compare.getBoundingClientRect();
      if (event.buttons & 1) this.move((100 * (event.clientX - box.left)) / box.width);
    };
    compare.addEventListener("pointerdown", (event) => { compare.setPointerCapture(event.pointerId); drag(event); });
    compare.addEventListener("pointermove", drag);
  }

  add(stage, kind, className, text) {
    const made = document.createElement(kind);
    made.className = className;
    made.textContent = text;
    if (kind !== "canvas") made.setAttribute("aria-hidden", "true");
    stage.append(made);
    return made;
  }

  canvas(stage, label) {
    const canvas = this.add(stage, "canvas", "", "");
    canvas.width = this.original.width;
    canvas.height = this.original.height;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", label);
    return canvas;
  }

  move(percent) {
    this.split.value = percent;
    this.drawCompared();
  }

  async load() {
    await Promise.all([this.original.decode(), this.reconstruction.decode()]);
    this.before = greys(this.original);
    this.after = greys(this.reconstruction);
  }

  async draw() {
    this.loaded ??= this.load();
    await this.loaded;
    this.drawCompared();
    paint(this.differing, (index) => view.colour[Math.abs(this.before[index] - this.after[index])]);
    this.card.querySelector(".limit").textContent = `${(view.limit / 100).toFixed(2)} and more`;
  }

  drawCompared() {
    if (!this.before) return;
    const share = Number(this.split.value) / 100;
    const width = this.compared.width;
    const edge = Math.round(share * width);
    paint(this.compared, (index) => view.grey[(index % width < edge ? this.before : this.after)[index]]);
    this.divider.style.left = `${100 * share}%`;
    this.divider.hidden = share === 0 || share === 1;
    this.left.hidden = share < 0.2;
    this.right.hidden = share > 0.7;
    this.split.setAttribute("aria-valuetext", `${this.split.value} % original`);
  }
}

document.body.className = "scripted";
const slices = Array.from(gallery.children, (card) => new Slice(card));
const ofCard = new Map(slices.map((slice) => [slice.card, slice]));
let shown = settings.shown;

// Only what is near the window is drawn, and drawn anew when a control moves.
const near = new Set();
const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) {
      near.add(ofCard.get(target));
      ofCard.get(target).draw();
    } else near.delete(ofCard.get(target));
  }
}, { rootMargin: "400px" });

function arrange() {
  const [, descending, key] = byId("sort").value.match(/^(-?)(.*)$/);
  const sign = descending ? -1 : 1;
  const value = (slice) => slice.card.dataset[key];
  slices.sort((a, b) => {
    if ((value(a) === "") !== (value(b) === "")) return value(a) === "" ? 1 : -1;
    return sign * (value(a) - value(b)) || a.card.dataset.index - b.card.dataset.index;
  });
  gallery.append(...slices.map((slice) => slice.card));
  slices.forEach((slice, index) => { slice.card.hidden = index >= shown; });
  const visible = Math.min(shown, slices.length);
  byId("more").hidden = visible === slices.length;
  byId("count").textContent = `${visible} of ${slices.length} on the page`;
}

function adjust() {
  for (const id of ["window", "level", "limit"]) {
    view[id] = Number(byId(id).value);
    document.querySelector(`output[for=${id}]`).textContent = (view[id] / 100).toFixed(2);
  }
  tables();
  for (const slice of near) slice.draw();
}

const bar = settings.colours.filter((_, index) => index % 15 === 0).map((colour) => `rgb(${colour})`).join(",");
for (const scale of document.querySelectorAll(".colours")) scale.style.background = `linear-gradient(90deg, ${bar})`;
for (const id of ["window", "level", "limit"]) byId(id).addEventListener("input", adjust);
byId("sort").addEventListener("change", () => { shown = settings.shown; arrange(); });
byId("more").addEventListener("click", () => {
  const next = slices[shown];
  shown += settings.shown;
  arrange();
  next.split.focus({ preventScroll: true });
});
byId("reset").addEventListener("click", () => {
  for (const id of ["window", "level", "limit"]) byId(id).value = byId(id).defaultValue;
  for (const slice of slices) slice.move(50);
  adjust();
});
adjust();
arrange();
for (const slice of slices) observer.observe(slice.card);
// On paper nobody scrolls: what was never near the window is drawn too.
addEventListener("beforeprint", () => { for (const slice of slices) if (!slice.card.hidden) slice.draw(); });
