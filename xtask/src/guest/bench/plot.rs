//! A picture of one run: a panel of bars for each kind of measurement.

use std::path::Path;

use anyhow::{Result, ensure};
use dcmalloc_benches::report::median;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::Row;

/// Title, bench, and metric of each panel.
const PANELS: &[(&str, &str, &str)] = &[
    ("From offer to memory, ms", "offer", "ms"),
    (
        "Mailbox commands per extent",
        "offer",
        "commands per extent",
    ),
    ("Copying, MiB per second", "copy", "MiB per second"),
    (
        "Key-value operations per second",
        "kv",
        "operations per second",
    ),
];
const SIZE: (u32, u32) = (960, 840);

/// Draws medians of `rows` into the SVG file `path`.
pub(super) fn draw(rows: &[&Row], path: &Path) -> Result<()> {
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    for ((title, bench, metric), area) in PANELS.iter().zip(root.split_evenly((2, 2))) {
        let bars: Vec<(&str, f64)> = rows
            .iter()
            .filter(|row| row.bench == *bench && row.metric == *metric)
            .map(|row| (row.case.as_str(), median(row.samples.iter().copied())))
            .collect();
        ensure!(!bars.is_empty(), "nothing was measured in {metric}");
        panel(&area, title, &bars)?;
    }
    root.present()?;
    Ok(())
}

/// Lying bars, with their names above them and their values behind them.
fn panel(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    title: &str,
    bars: &[(&str, f64)],
) -> Result<()> {
    let longest = bars.iter().fold(0.0, |most: f64, bar| most.max(bar.1));
    let mut chart = ChartBuilder::on(area)
        .margin(16)
        .caption(title, ("sans-serif", 18))
        .build_cartesian_2d(0.0..longest * 1.25, bars.len() as f64..0.0)?;
    let text = |color: &RGBColor, vertical| {
        let style = ("sans-serif", 13).into_font().color(color);
        style.pos(Pos::new(HPos::Left, vertical))
    };
    for (at, (name, value)) in bars.iter().enumerate() {
        let (middle, bottom) = (at as f64 + 0.42, at as f64 + 0.84);
        let bar = Rectangle::new(
            [(0.0, middle), (*value, bottom)],
            RGBColor(70, 110, 170).filled(),
        );
        let name = Text::new(
            (*name).to_owned(),
            (0.0, middle),
            text(&BLACK, VPos::Bottom),
        );
        // Three digits are what such numbers are worth.
        let digits = 2_usize.saturating_sub(value.abs().max(1.0).log10() as usize);
        let told = format!(" {value:.digits$}");
        let told = Text::new(
            told,
            (*value, (middle + bottom) / 2.0),
            text(&BLACK, VPos::Center),
        );
        chart.draw_series([bar])?;
        chart.draw_series([name, told])?;
    }
    Ok(())
}
