// Draws the charts, sorts and filters the tables. Everything it needs is in the page.
(function () {
  "use strict";

  const specs = JSON.parse(document.getElementById("specs").textContent);
  for (const [name, spec] of Object.entries(specs)) {
    const actions = { export: { svg: true, png: true }, source: false, compiled: false, editor: false };
    const options = { renderer: "svg", actions, downloadFileName: name, tooltip: { theme: "dark" } };
    window.vegaEmbed("#chart-" + name, spec, options).catch(function (error) {
      document.getElementById("chart-" + name).textContent = "This chart cannot be drawn here: " + error.message;
      console.error(error);
    });
  }

  function keyOf(row, column) {
    const cell = row.cells[column];
    const value = cell.dataset.value;
    return value === undefined ? cell.textContent : value === "" ? null : Number(value);
  }

  // What has no value comes last, either way.
  function compare(first, second, direction) {
    if (first === null || second === null) return (first === null) - (second === null);
    return (first < second ? -1 : first > second ? 1 : 0) * direction;
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach(function (head, column) {
      head.querySelector("button").addEventListener("click", function () {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const body = table.tBodies[0];
        const keyed = [...body.rows].map((row) => [keyOf(row, column), row]);
        keyed.sort((one, two) => compare(one[0], two[0], down ? -1 : 1));
        body.append(...keyed.map((pair) => pair[1]));
      });
    });
  }

  const text = document.getElementById("filter");
  const status = document.getElementById("status");
  const shown = document.getElementById("shown");
  const rows = [...document.querySelectorAll("#cells tbody tr")];
  function filter() {
    const wanted = text.value.toLowerCase();
    let count = 0;
    for (const row of rows) {
      const fits = row.textContent.toLowerCase().includes(wanted) && (!status.value || row.dataset.status === status.value);
      row.hidden = !fits;
      count += fits;
    }
    shown.textContent = count + " of " + rows.length;
  }
  text.addEventListener("input", filter);
  status.addEventListener("change", filter);
  filter();
})();
