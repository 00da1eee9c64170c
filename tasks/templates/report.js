"use strict";
// Draws the charts, sorts tables and saves the figures. Lengths are shares of an axis; every number that is read was
// spelt by Farthing: nothing is computed, rounded or spelt in here.
(() => {
  const COLOURS = ["--first", "--second", "--third", "--fourth", "--fifth"];
  const ROW = 34, AXES = 64;

  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const nth = number => colour(COLOURS[number % COLOURS.length]);

  const marking = mark => ({
    id: "mark",
    afterDatasetsDraw({ctx, chartArea: {left, right, top, bottom}}) {
      const x = left + mark.at * (right - left), isRight = mark.at > 0.5;
      ctx.save();
      ctx.strokeStyle = ctx.fillStyle = colour("--ink");
      ctx.setLineDash([5, 4]);
      ctx.beginPath();
      ctx.moveTo(x, top);
      ctx.lineTo(x, bottom);
      ctx.stroke();
      ctx.font = `600 12px ${Chart.defaults.font.family}`;
      ctx.textAlign = isRight ? "right" : "left";
      ctx.fillText(mark.shown, x + (isRight ? -7 : 7), top + 12);
      ctx.restore();
    },
  });

  const bars = (chart, series, number) => ({
    label: series.name,
    data: chart.kind === "line" ? series.lengths : series.lengths.map(length => length || null),
    shown: series.shown,
    // A tier has one colour on the whole page.
    backgroundColor: chart.key === "tiers" ? chart.names.map((_, tier) => nth(tier)) : nth(number),
    borderColor: chart.kind === "line" ? nth(number) : colour("--paper"),
    borderWidth: chart.kind === "line" ? 2 : {top: chart.kind === "stacked" && number ? 1 : 0},
    minBarLength: chart.kind === "stacked" ? undefined : 2,
    barPercentage: chart.kind === "lying" ? 0.7 : 0.96,
    categoryPercentage: chart.kind === "lying" ? 0.9 : 1,
    pointRadius: chart.names.length > 40 ? 1.5 : 3,
  });

  const config = chart => {
    const isLying = chart.kind === "lying";
    const title = text => ({display: Boolean(text), text, color: colour("--soft")});
    const along = {
      title: title(chart.along),
      stacked: chart.kind === "stacked",
      grid: {display: false},
      border: {color: colour("--soft")},
      ticks: {maxRotation: 0, autoSkip: !isLying, autoSkipPadding: 14, color: colour(isLying ? "--ink" : "--soft")},
    };
    const across = {
      title: title(chart.across),
      stacked: chart.kind === "stacked",
      min: 0,
      max: 1,
      grid: {color: colour("--line")},
      border: {display: false},
      afterBuildTicks: axis => { axis.ticks = chart.ticks.map(([value]) => ({value})); },
      ticks: {color: colour("--soft"), maxRotation: 0, callback: (_, index) => chart.ticks[index][1]},
    };
    return {
      type: chart.kind === "line" ? "line" : "bar",
      data: {labels: chart.names, datasets: chart.series.map((series, number) => bars(chart, series, number))},
      plugins: chart.mark ? [marking(chart.mark)] : [],
      options: {
        animation: false,
        maintainAspectRatio: false,
        indexAxis: isLying ? "y" : "x",
        interaction: {mode: "index", intersect: false, axis: isLying ? "y" : "x"},
        scales: isLying ? {x: across, y: along} : {x: along, y: across},
        plugins: {
          legend: {
            display: chart.series.length > 1,
            align: "start",
            labels: {color: colour("--ink"), boxWidth: 12, boxHeight: 12},
          },
          tooltip: {
            callbacks: {
              title: ([first]) => chart.titles[first.dataIndex],
              label: ({dataset, dataIndex}) => ` ${dataset.label}: ${dataset.shown[dataIndex]}`,
            },
          },
        },
      },
    };
  };

  const charts = JSON.parse(document.getElementById("charts").textContent);
  const drawn = [];
  const draw = () => {
    drawn.splice(0).forEach(chart => chart.destroy());
    Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
    for (const chart of Object.values(charts)) {
      const canvas = document.getElementById(`chart-${chart.key}`);
      if (chart.kind === "lying") canvas.parentElement.style.height = `${AXES + ROW * chart.names.length}px`;
      drawn.push(new Chart(canvas, config(chart)));
    }
  };

  // Numbers are compared as they are, to the last unit; the rest as it is read.
  const compare = (one, other) => {
    if (one.dataset.key && other.dataset.key) {
      const [low, high] = [BigInt(one.dataset.key), BigInt(other.dataset.key)];
      return low < high ? -1 : Number(low > high);
    }
    if (one.dataset.key || other.dataset.key) return one.dataset.key ? 1 : -1;
    return one.textContent.localeCompare(other.textContent, "en", {numeric: true});
  };

  const sort = (table, heading, column) => {
    const isNumber = heading.classList.contains("number");
    const was = heading.getAttribute("aria-sort");
    const order = was === "none" ? (isNumber ? "descending" : "ascending") : was === "ascending" ? "descending" : "ascending";
    table.querySelectorAll("thead th").forEach(each => each.setAttribute("aria-sort", "none"));
    heading.setAttribute("aria-sort", order);
    const rows = [...table.tBodies[0].rows].sort((one, other) => compare(one.cells[column], other.cells[column]));
    table.tBodies[0].append(...(order === "descending" ? rows.reverse() : rows));
  };

  for (const table of document.querySelectorAll("table")) {
    const headings = table.querySelectorAll("thead th");
    headings.forEach((heading, column) => {
      const cells = [...table.tBodies[0].rows].map(row => row.cells[column]);
      if (column && cells.some(cell => cell.dataset.key)) [heading, ...cells].forEach(cell => cell.classList.add("number"));
      if (!table.classList.contains("sortable")) return;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = heading.textContent;
      button.addEventListener("click", () => sort(table, heading, column));
      heading.replaceChildren(button);
      heading.setAttribute("aria-sort", "none");
    });
  }

  const save = document.getElementById("save");
  save.hidden = false;
  save.addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([document.getElementById("figures").textContent], {type: "application/json"}));
    link.download = `${document.title.replace(/[^\w]+/g, "-")}.json`;
    link.click();
    URL.revokeObjectURL(link.href);
  });

  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
