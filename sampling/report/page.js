"use strict";
// Tables: a click on a head sorts, the boxes above choose rows. Pictures: a click or
// Enter enlarges. Of the tables of a choice one is shown.
const value = (cell) => {
  const number = Number(cell.dataset.value);
  return cell.dataset.value !== undefined && !Number.isNaN(number) ? number : cell.textContent.trim();
};

// What is empty comes last, whichever way is sorted.
const compare = (a, b, sign) => {
  if (a === "" || b === "") return a === b ? 0 : a === "" ? 1 : -1;
  if (typeof a === "number" && typeof b === "number") return sign * (a - b);
  return sign * String(a).localeCompare(String(b), undefined, { numeric: true });
};

for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  table.tHead.querySelectorAll("th").forEach((head, column) => {
    head.tabIndex = 0;
    const sort = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].sort(
        (a, b) => compare(value(a.cells[column]), value(b.cells[column]), down ? -1 : 1),
      );
      body.append(...rows);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });

  const controls = table.closest("section").querySelector(".controls");
  if (!controls) continue;
  const search = controls.querySelector("input");
  const choices = [...controls.querySelectorAll("select")];
  const count = controls.querySelector("output");
  for (const choice of choices) {
    const column = Number(choice.dataset.column);
    const found = [...new Set([...body.rows].map((row) => row.cells[column].textContent.trim()))];
    for (const text of found) choice.add(new Option(text, text));
    choice.parentElement.hidden = found.length < 2;
  }
  const filter = () => {
    let shown = 0;
    for (const row of body.rows) {
      const fits = choices.every((choice) =>
        choice.value === "" || row.cells[Number(choice.dataset.column)].textContent.trim() === choice.value);
      row.hidden = !(fits && row.textContent.toLowerCase().includes(search.value.toLowerCase()));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${body.rows.length}`;
  };
  search.addEventListener("input", filter);
  for (const choice of choices) choice.addEventListener("change", filter);
  filter();
}

// Arrow keys lead to the next picture of the line or column; the slider uncovers the one before.
const zoom = document.createElement("dialog");
zoom.id = "zoom";
zoom.innerHTML = '<figure tabindex="-1"><img alt=""><img alt="" class="before"></figure>'
  + '<label class="controls"><span></span><input type="range" min="0" max="100" value="0"></label><p></p>';
document.body.append(zoom);
const [after, before] = zoom.querySelectorAll("img");
const slider = zoom.querySelector("input");
let enlarged = null; // { lines, line, column, kind }
const uncover = () => { before.style.clipPath = `inset(0 ${100 - slider.value}% 0 0)`; };
const enlarge = (lines, line, column, kind) => {
  const picture = lines[line]?.[column];
  if (!picture) return;
  enlarged = { lines, line, column, kind };
  const other = kind === "line" ? lines[0][column] : kind === "first" ? lines[line][0] : picture;
  after.src = picture.src;
  before.src = other.src;
  before.hidden = slider.parentElement.hidden = other === picture;
  zoom.querySelector("span").textContent = `uncover ${other.alt}`;
  zoom.querySelector("p").textContent = picture.alt;
  uncover();
  if (!zoom.open) zoom.showModal();
  zoom.querySelector("figure").focus();
};
for (const gallery of document.querySelectorAll(".gallery")) {
  const lines = [];
  for (const child of gallery.children) {
    if (child.classList.contains("name")) lines.push([]);
    if (child.tagName !== "IMG") continue;
    const [line, column] = [lines.length - 1, lines.at(-1).length];
    lines[line].push(child);
    child.tabIndex = 0;
    const open = () => enlarge(lines, line, column, gallery.dataset.before);
    child.addEventListener("click", open);
    child.addEventListener("keydown", (event) => { if (event.key === "Enter") open(); });
  }
}
slider.addEventListener("input", uncover);
zoom.addEventListener("click", (event) => { if (!slider.parentElement.contains(event.target)) zoom.close(); });
zoom.addEventListener("keydown", (event) => {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const step = steps[event.key];
  if (!step || event.target === slider) return;
  event.preventDefault();
  const { lines, line, column, kind } = enlarged;
  enlarge(lines, line + step[0], column + step[1], kind);
});

for (const choice of document.querySelectorAll(".choice")) {
  const chooser = choice.querySelector("select");
  const show = () => choice.querySelectorAll(".chosen").forEach((each, number) => {
    each.hidden = number !== Number(chooser.value);
  });
  chooser.addEventListener("change", show);
  show();
}
