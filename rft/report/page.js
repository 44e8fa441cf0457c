// Interaction of the page: sorting, differences to a row, highlighting, sliders. The page is complete
// without this script. The script creates its own controls, so that none appears without it.
"use strict";
{
  const data = JSON.parse(document.getElementById("page-data").textContent);

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  // One tab stop for all elements of a selector; keys (name -> offset) move between them.
  function rove(container, selector, keys) {
    const found = () => [...container.querySelectorAll(selector)];
    found().forEach((item, place) => { item.tabIndex = place ? -1 : 0; });
    container.addEventListener("keydown", (event) => {
      const items = found(), at = items.indexOf(event.target.closest(selector));
      const to = { Home: 0, End: items.length - 1 }[event.key] ?? at + keys[event.key];
      if (at < 0 || !items[to]) return;
      event.preventDefault();
      items[to].focus();
    });
    container.addEventListener("focusin", (event) => {
      const chosen = event.target.closest(selector);
      if (chosen) for (const item of found()) item.tabIndex = item === chosen ? 0 : -1;
    });
  }

  // Sorting: a header's button cycles through its two orders and the order of the page.

  function number(row, column) {
    const text = row.cells[column].textContent.replaceAll(",", "");
    return Number(/[-+]?\d+(\.\d+)?/.exec(text)?.[0] ?? NaN);
  }

  function compare(one, two, column, sign) {
    if (!column) {
      const [a, b] = [one, two].map((row) => row.cells[0].textContent);
      return sign * a.localeCompare(b, "en", { numeric: true });
    }
    const [a, b] = [one, two].map((row) => number(row, column));
    // cells without a number are last in both orders
    return isNaN(a) || isNaN(b) ? isNaN(a) - isNaN(b) : sign * (a - b);
  }

  // Returns a function that re-sorts the table after its cells have changed.
  function sortable(table) {
    const rows = [...table.tBodies[0].rows], heads = [...table.tHead.rows[0].cells];
    let sorted = 0, order = "";
    function sort() {
      const found = [...rows];
      if (order) found.sort((a, b) => compare(a, b, sorted, order === "ascending" ? 1 : -1));
      table.tBodies[0].append(...found);
      // the keyboard enters at the row that is now at the top
      found.forEach((row, place) => { row.cells[0].tabIndex = place ? -1 : 0; });
      heads.forEach((head, column) => {
        head.setAttribute("aria-sort", order && column === sorted ? order : "none");
      });
    }
    heads.forEach((head, column) => {
      // names start with A, numbers with the largest
      const orders = column ? ["descending", "ascending", ""] : ["ascending", "descending", ""];
      const button = make("button", { type: "button" }, ...head.childNodes);
      button.addEventListener("click", () => {
        order = orders[column === sorted ? (orders.indexOf(order) + 1) % 3 : 0];
        sorted = column;
        sort();
      });
      head.append(button);
    });
    rove(table.tHead, "button", { ArrowLeft: -1, ArrowRight: 1 });
    rove(table.tBodies[0], "th", { ArrowUp: -1, ArrowDown: 1 });
    return sort;
  }

  // Differences to a selected row, in place of the accuracies.

  function signed(value) {
    const text = Math.abs(value).toFixed(2);
    return `${value < 0 && Number(text) ? "-" : "+"}${text}`;
  }

  // Returns the content of a cell: the difference and, below it, its interval if there is one.
  function difference(row, other, column) {
    const a = data.means[row][column], b = data.means[other][column];
    if (a === null || b === null) return [data.absent];
    if (row === other) return ["0"];
    const sign = row > other ? 1 : -1;
    const pair = data.pairs[Math.max(row, other)]?.[Math.min(row, other)]?.[column];
    if (!pair) return [signed(a - b)];
    const [value, low, high, significant] = pair;
    const [from, to] = row > other ? [low, high] : [-high, -low];
    return [
      signed(sign * value), ...(significant ? [make("span", { class: "mark" }, data.mark)] : []),
      make("span", { class: "interval" }, `${signed(from)} to ${signed(to)}`),
    ];
  }

  function differences(table, sort) {
    const rows = [...table.tBodies[0].rows];
    const cells = rows.map((row) => [...row.cells].slice(2));
    const accuracies = cells.map((line) => line.map((cell) => [...cell.childNodes]));
    const note = make("output", { class: "muted" });
    // off, because some browsers restore a selection after a reload and the table would not show it
    const select = make("select", { autocomplete: "off" }, make("option", { value: "" }, "accuracy"), ...rows.map(
      (row, place) => make("option", { value: place }, `difference to ${row.cells[0].textContent}`),
    ));
    select.addEventListener("change", () => {
      const against = select.value;
      cells.forEach((line, row) => line.forEach((cell, column) => {
        const kept = accuracies[row][column];
        cell.replaceChildren(...(against ? difference(row, Number(against), column) : kept));
      }));
      const measured = data.pairs.flat(2).some(Boolean)
        ? "Below it is the 95% interval for resampled test images. "
          + `${data.mark}: it excludes 0, and every seed's own difference has its sign.`
        : "Without predictions there are no intervals.";
      const others = rows.length > data.pairs.length
        ? ` Only the first ${data.pairs.length} rows have intervals.` : "";
      // outside the controls, which are not printed
      note.textContent = !against ? ""
        : `Difference to ${rows[against].cells[0].textContent}, in points. ${measured}${others}`;
      sort();
    });
    const controls = make("div", { class: "controls" }, make("label", {}, "numbers of the table: ", select));
    table.closest(".scroll").before(controls, note);
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const sort = sortable(table);
    if (table.closest("#accuracy") && table.tBodies[0].rows.length > 1) differences(table, sort);
  }

  // Highlights the row under the pointer, or with the focus, in all tables and figures.

  const tied = Map.groupBy(document.querySelectorAll("[data-row]"), (element) => element.dataset.row);
  const tip = make("div", { class: "tip", "aria-hidden": "true", hidden: "" });
  document.body.append(tip);
  let lit = null;

  function light(id) {
    if (id === lit) return;
    const mark = (name, on) => {
      for (const element of tied.get(name) ?? []) {
        element.classList.toggle("lit", on);
        element.closest(".drawing")?.classList.toggle("dimmed", on);
      }
    };
    mark(lit, false);
    mark(id, true);
    lit = id;
  }

  function point(id, x, y) {
    const row = data.rows[id];
    tip.hidden = !row;
    if (!row) return;
    tip.replaceChildren(make("strong", {}, row.name), make("span", {}, row.numbers));
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 4))}px`;
    tip.style.top = `${y + 18 + height > innerHeight ? Math.max(4, y - height - 10) : y + 18}px`;
  }

  // Finds the nearest element of a row within a few pixels, because curves are thinner than fingers.
  function nearest(drawing, x, y) {
    for (const radius of [0, 4, 8]) {
      for (let turn = 0; turn < (radius ? 8 : 1); turn++) {
        const [dx, dy] = [Math.cos, Math.sin].map((of) => radius * of(turn * Math.PI / 4));
        const found = document.elementFromPoint(x + dx, y + dy)?.closest("[data-row]");
        if (found && drawing.contains(found)) return found;
      }
    }
    return null;
  }

  for (const name of ["pointermove", "pointerdown"]) {
    document.addEventListener(name, (event) => {
      const drawing = event.target.closest(".drawing");
      const found = drawing
        ? nearest(drawing, event.clientX, event.clientY) : event.target.closest("[data-row]");
      const id = found?.dataset.row ?? null;
      light(id);
      point(drawing && id, event.clientX, event.clientY);
    });
  }
  document.documentElement.addEventListener("pointerleave", (event) => {
    // a finger "leaves" whenever it is lifted
    if (event.pointerType !== "mouse") return;
    light(null);
    point(null);
  });
  document.addEventListener("focusin", (event) => {
    const found = event.target.closest("[data-row]");
    // a click also moves the focus, but is handled above with its own position
    if (!found || !event.target.matches(":focus-visible")) return;
    light(found.dataset.row);
    const { left, bottom } = found.getBoundingClientRect();
    point(found.closest(".drawing") && found.dataset.row, left, bottom - 12);
  });
  document.addEventListener("focusout", () => { light(null); point(null); });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    light(null);
    point(null);
  });

  // Figures: the keyboard reaches each row once; entries of a legend isolate their rows.

  const ARROWS = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };

  function isolating(drawing, legend) {
    const kept = new Set();
    const entries = [...legend.querySelectorAll("[data-row]")];
    function show() {
      drawing.classList.toggle("isolated", kept.size > 0);
      for (const element of drawing.querySelectorAll("[data-row]")) {
        element.classList.toggle("kept", kept.has(element.dataset.row));
      }
      for (const entry of entries) entry.setAttribute("aria-pressed", kept.has(entry.dataset.row));
    }
    function toggle(id) {
      if (!kept.delete(id)) kept.add(id);
      show();
    }
    for (const entry of entries) entry.classList.add("pressable");
    drawing.before(make("p", { class: "controls muted" },
      "Select entries of the legend to see only their curves; Escape shows all."));
    drawing.addEventListener("click", (event) => {
      const found = nearest(drawing, event.clientX, event.clientY);
      if (found && legend.contains(found)) toggle(found.dataset.row);
    });
    drawing.addEventListener("keydown", (event) => {
      const entry = event.target.closest(".pressable");
      if (!entry || (event.key !== "Enter" && event.key !== " ")) return;
      event.preventDefault();
      toggle(entry.dataset.row);
    });
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      kept.clear();
      show();
    });
    show();
  }

  for (const drawing of document.querySelectorAll(".drawing")) {
    const legend = drawing.querySelector("[id*=legend]:has([data-row])");
    const stops = new Map();
    // the stop of a row: the text of its legend entry, the marker of its point, or its panel
    const plain = drawing.querySelector(".point") ? ".point" : "[data-row]";
    const wanted = legend ? "[id*=legend] [data-row]:has(text)" : plain;
    for (const element of drawing.querySelectorAll(wanted)) {
      if (!stops.has(element.dataset.row)) stops.set(element.dataset.row, element);
    }
    // role "img" would hide the parts from screen readers
    drawing.setAttribute("role", "group");
    for (const [id, stop] of stops) {
      const { name, numbers } = data.rows[id];
      stop.classList.add("stop");
      stop.setAttribute("role", legend ? "button" : "img");
      stop.setAttribute("aria-label", `${name}: ${numbers}`);
    }
    rove(drawing, ".stop", ARROWS);
    if (legend) isolating(drawing, legend);
  }

  // Sliders.

  // Returns a labelled slider over `texts`, with an output that names the current picture or value.
  function slider(label, texts, start, show) {
    const list = make("datalist", { id: `steps-${document.querySelectorAll("datalist").length}` },
      ...texts.map((text, place) => make("option", { value: place, label: text })));
    const range = make("input", {
      type: "range", min: 0, max: texts.length - 1, step: 1, value: start, list: list.id, autocomplete: "off",
    });
    const output = make("output");
    const update = () => {
      const place = Number(range.value);
      range.setAttribute("aria-valuetext", texts[place]);
      output.replaceChildren(...show(place));
    };
    range.addEventListener("input", update);
    update();
    return make("div", { class: "controls" }, make("label", {}, `${label} `, range), list, output);
  }

  // Marks the points of each WiSE family at one of the evaluated alphas.
  const wise = document.querySelector(".drawing[data-figure=wise]");
  const families = Object.entries(data.paths);
  const alphas = [...new Set(families.flatMap(([, path]) => path.map(([alpha]) => alpha)))];
  alphas.sort((a, b) => a - b);

  function ring(id) {
    const marker = wise.querySelector(`.point[data-row="${id}"] use`);
    if (!marker) return;
    const circle = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    for (const [name, value] of Object.entries({
      class: "ring", cx: marker.getAttribute("x"), cy: marker.getAttribute("y"), r: 7,
    })) circle.setAttribute(name, value);
    wise.querySelector("svg").append(circle);
  }

  if (wise && alphas.length > 1) {
    const middle = alphas.reduce((a, b) => Math.abs(b - 0.5) < Math.abs(a - 0.5) ? b : a);
    wise.before(slider("alpha", alphas.map(String), alphas.indexOf(middle), (place) => {
      const found = families.flatMap(([family, path]) => path
        .filter(([alpha]) => alpha === alphas[place]).map(([, id]) => [family, id]));
      for (const old of wise.querySelectorAll(".ring")) old.remove();
      for (const id of new Set(found.map(([, id]) => id))) ring(id);
      return [`alpha ${alphas[place]}:`, ...found.map(
        ([family, id]) => make("span", {}, `${family}: ${data.rows[id].numbers}`))];
    }));
  }

  // Shows one of several pictures, such as the gallery's steps; the last one at first.
  for (const frames of document.querySelectorAll(".frames")) {
    const all = [...frames.querySelectorAll("figure[data-label]")];
    if (all.length < 2) continue;
    frames.append(...all);
    frames.querySelector(".others").remove();
    frames.prepend(slider("picture", all.map((one) => one.dataset.label), all.length - 1, (place) => {
      all.forEach((one, at) => { one.hidden = at !== place; });
      return [all[place].dataset.label];
    }));
  }
}
