"use strict";
// Tables: a click on a head sorts, the boxes above choose rows. Pictures: a click enlarges. Of the
// tables of a choice one is shown.
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

const zoom = document.createElement("dialog");
zoom.id = "zoom";
zoom.innerHTML = '<figure><img alt=""><figcaption></figcaption></figure>';
document.body.append(zoom);
for (const picture of document.querySelectorAll(".gallery img")) {
  picture.addEventListener("click", () => {
    zoom.querySelector("img").src = picture.src;
    zoom.querySelector("figcaption").textContent = picture.alt;
    zoom.showModal();
  });
}
zoom.addEventListener("click", () => zoom.close());

for (const choice of document.querySelectorAll(".choice")) {
  const chooser = choice.querySelector("select");
  const show = () => choice.querySelectorAll(".chosen").forEach((each, number) => {
    each.hidden = number !== Number(chooser.value);
  });
  chooser.addEventListener("change", show);
  show();
}
