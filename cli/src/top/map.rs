//! Extents as rows of cells, each in the colour of who holds it.
#![forbid(unsafe_code)]

use dax_backend::broker::GRANULE;
use dax_backend::broker::map::{MapRun, MapState};
use dax_backend::broker::status::ExtentStatus;
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span};

use super::flow::Flow;
use crate::size::Bytes;

/// Columns before the cells.
const LABEL: usize = 26;

/// The colours of processes: easy to tell apart on black and on white.
const COLOURS: [u8; 8] = [39, 208, 71, 169, 179, 73, 141, 203];

/// The colour of the process that was seen as number `index`.
pub(super) fn colour(index: Option<usize>) -> Color {
    index.map_or(Color::Reset, |index| {
        Color::Indexed(COLOURS[index % COLOURS.len()])
    })
}

/// The lines of a map that is `width` wide and, where that is possible at all,
/// no more than `height` high; and how many bytes a cell is.
pub(super) fn lines(
    extents: &[ExtentStatus],
    flow: &Flow,
    width: usize,
    height: usize,
) -> (Vec<Line<'static>>, u64) {
    let columns = width.saturating_sub(LABEL).max(8);
    let granules = |extent: &ExtentStatus| (extent.span.len / GRANULE) as usize;
    let largest = extents.iter().map(granules).max().unwrap_or(1).max(1);
    let rows = |cell: usize| -> usize {
        let rows = extents
            .iter()
            .map(|e| granules(e).div_ceil(cell).div_ceil(columns));
        rows.map(|rows| rows.max(1)).sum()
    };
    let cell = std::iter::successors(Some(1usize), |cell| Some(cell * 2))
        .find(|cell| rows(*cell) <= height || cell * columns >= largest)
        .unwrap_or(1);
    let lines = extents
        .iter()
        .flat_map(|extent| extent_lines(extent, flow, cell, columns));
    (lines.collect(), cell as u64 * GRANULE)
}

fn extent_lines(
    extent: &ExtentStatus,
    flow: &Flow,
    cell: usize,
    columns: usize,
) -> Vec<Line<'static>> {
    let share = 100 * u128::from(extent.leased) / u128::from(extent.span.len.max(1));
    let label = format!(
        "{:>12} {:>6} {:>3}%{} ",
        extent.span.dpa.to_string(),
        Bytes(extent.span.len).to_string(),
        share,
        if extent.tag.is_some() { "#" } else { " " },
    );
    let cells: Vec<MapRun> = extent
        .map
        .iter()
        .flat_map(|run| std::iter::repeat_n(*run, (run.len / GRANULE) as usize))
        .collect();
    let glyphs: Vec<(char, Style)> = cells.chunks(cell).map(|cell| glyph(cell, flow)).collect();
    let mut rows: Vec<&[(char, Style)]> = glyphs.chunks(columns).collect();
    if rows.is_empty() {
        rows.push(&[]);
    }
    let line = |(index, row): (usize, &[(char, Style)])| {
        let label = if index == 0 { &*label } else { "" };
        let mut spans = vec![Span::raw(format!("{label:<LABEL$}")).dim()];
        // Neighbours of one style are one span.
        for run in row.chunk_by(|a, b| a.1 == b.1) {
            let text: String = run.iter().map(|(glyph, _)| glyph).collect();
            spans.push(Span::styled(text, run[0].1));
        }
        Line::from(spans)
    };
    rows.into_iter().enumerate().map(line).collect()
}

/// What is most in a cell, as a character; what goes back shows in any case.
fn glyph(cell: &[MapRun], flow: &Flow) -> (char, Style) {
    let most = cell
        .iter()
        .max_by_key(|run| cell.iter().filter(|other| other.pid == run.pid).count());
    let Some(run) = most else {
        return (' ', Style::new());
    };
    let style = match run.pid {
        Some(pid) => Style::new().fg(colour(flow.colour(pid))),
        None => Style::new().dim(),
    };
    let going = cell.iter().any(|run| run.outgoing);
    match run.state {
        _ if going => ('◂', style.fg(Color::Indexed(203))),
        MapState::Leased => ('■', style),
        MapState::Lost | MapState::Broken => ('x', style.fg(Color::Indexed(203))),
        MapState::Dirty => ('░', style),
        MapState::Clean | MapState::Warm => ('·', style),
        MapState::Shared => ('s', style),
    }
}
