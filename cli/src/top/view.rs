//! What `dcm top` draws.
#![forbid(unsafe_code)]

use dax_backend::broker::client_page::{STALL_BUCKETS, STALL_FIRST_POWER};
use dax_backend::broker::status::{ProcessReport, Status};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Paragraph, Row, Table};

use super::flow::Flow;
use super::map;
use crate::picture::{degraded, duration};
use crate::size::Bytes;

/// Lines for receipts and stalls.
const BOTTOM: u16 = 8;
/// The names of the eight heights of a bar.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const ALERT: Color = Color::Indexed(203);

/// Draws everything.
pub(super) fn draw(frame: &mut Frame<'_>, flow: &Flow) {
    let Some(status) = &flow.status else {
        let why = flow.trouble.as_deref().unwrap_or("asking the broker");
        frame.render_widget(Paragraph::new(why.to_owned()), frame.area());
        return;
    };
    let processes = (status.clients.len() as u16).clamp(1, 10) + 2;
    let [head, map, table, bottom, foot] = Layout::vertical([
        Constraint::Length(3),
        Constraint::Min(4),
        Constraint::Length(processes),
        Constraint::Length(BOTTOM),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(Paragraph::new(header(status, flow)), head);
    draw_map(frame, map, status, flow);
    draw_processes(frame, table, status, flow);
    let [receipts, stalls] =
        Layout::horizontal([Constraint::Fill(1), Constraint::Length(46)]).areas(bottom);
    draw_receipts(frame, receipts, status);
    draw_stalls(frame, stalls, status);
    let legend = Line::from(vec![
        " q".bold(),
        " quit   ".into(),
        "■ held  · free  ░ to be wiped  ".dim(),
        Span::styled("◂", Style::new().fg(ALERT)),
        " going back".dim(),
    ]);
    frame.render_widget(Paragraph::new(legend), foot);
}

fn header(status: &Status, flow: &Flow) -> Vec<Line<'static>> {
    let (device, capacity) = (&status.device, &status.capacity);
    let first = Line::from(vec![
        " dcm ".bold().reversed(),
        format!(
            " broker {} pid {}, up {}   device {} at {}, {} groups answered",
            status.version,
            status.pid,
            duration(status.uptime_ms.saturating_mul(1000)),
            Bytes(device.span.len),
            device.span.dpa,
            device.counters.groups_answered,
        )
        .into(),
    ]);
    let second = Line::from(vec![
        " capacity ".into(),
        Bytes(capacity.accepted).to_string().bold(),
        format!(
            "  leased {}  free {} ({} ready)  going back {}  ran out {} times",
            Bytes(capacity.leased),
            Bytes(capacity.free),
            Bytes(capacity.warm),
            Bytes(capacity.outgoing),
            status.counters.exhausted,
        )
        .into(),
    ]);
    vec![first, second, activity(status, flow)]
}

/// What goes on at the moment, in one line.
fn activity(status: &Status, flow: &Flow) -> Line<'static> {
    if let Some(trouble) = &flow.trouble {
        return Line::styled(format!(" no answer: {trouble}"), Style::new().fg(ALERT));
    }
    if let Some(recall) = &status.recall {
        let asked: Vec<String> = recall
            .waiting
            .iter()
            .take(4)
            .map(|ask| format!("{} for {}", ask.pid, Bytes(ask.bytes)))
            .collect();
        let queued = match recall.queued {
            0 => String::new(),
            more => format!(", {more} more wait"),
        };
        let text = format!(
            " recall #{} by {}: {} of {} back, {} left, asking {}{queued}",
            recall.id,
            recall.origin,
            Bytes(recall.returned),
            Bytes(recall.asked),
            duration(recall.left_ms.saturating_mul(1000)),
            asked.join(", "),
        );
        return Line::styled(text, Style::new().fg(ALERT).bold());
    }
    if let Some(error) = &status.device.last_error {
        return Line::styled(format!(" device: {error}"), Style::new().fg(ALERT));
    }
    Line::from(" no recall under way".dim())
}

fn panel(title: String) -> Block<'static> {
    Block::new()
        .borders(Borders::TOP)
        .border_style(Style::new().dim())
        .title(Span::raw(title).bold().not_dim())
}

fn draw_map(frame: &mut Frame<'_>, area: Rect, status: &Status, flow: &Flow) {
    let height = usize::from(area.height.saturating_sub(1));
    let (mut lines, cell) = map::lines(&status.extents, flow, area.width.into(), height);
    if lines.len() > height && height > 0 {
        let hidden = lines.len() - (height - 1);
        lines.truncate(height - 1);
        lines.push(Line::from(format!(" and {hidden} lines more").dim()));
    }
    let title = format!(" extents · a cell is {} ", Bytes(cell));
    frame.render_widget(Paragraph::new(lines).block(panel(title)), area);
}

fn draw_processes(frame: &mut Frame<'_>, area: Rect, status: &Status, flow: &Flow) {
    let mut processes: Vec<&ProcessReport> = status.clients.iter().collect();
    processes.sort_by_key(|process| (std::cmp::Reverse(process.leased), process.pid));
    let rows = processes.iter().map(|process| {
        let stats = &process.stats;
        let moves = flow.moves(process.pid);
        let rate = |bytes: f64| match bytes as u64 {
            0 => "-".to_owned(),
            bytes => format!("{}/s", Bytes(bytes)),
        };
        let stall = match stats.move_stall_max_ns {
            0 => "-".to_owned(),
            ns => duration(ns / 1000),
        };
        Row::new(vec![
            Line::styled("■", map::colour(flow.colour(process.pid))),
            Line::from(process.pid.to_string()).right_aligned(),
            Line::from(process.command.clone()),
            Line::from(Bytes(process.leased).to_string()).right_aligned(),
            Line::from(Bytes(stats.extent_live_bytes).to_string()).right_aligned(),
            Line::from(Bytes(stats.dram_live_bytes).to_string()).right_aligned(),
            Line::from(rate(moves.out)).right_aligned(),
            Line::from(rate(moves.back)).right_aligned(),
            Line::from(stall).right_aligned(),
            Line::styled(degraded(stats.degraded_flags).join(", "), ALERT),
        ])
    });
    let header = Row::new(
        [
            "",
            "    PID",
            "COMMAND",
            "   LEASED",
            "  LIVE DC",
            "LIVE DRAM",
            "  MOVED OUT",
            "      BACK",
            "  WORST",
            "DEGRADED",
        ]
        .map(Line::from),
    )
    .style(Style::new().dim());
    let widths = [1, 7, 15, 9, 9, 9, 11, 10, 8].map(Constraint::Length);
    let widths = widths.into_iter().chain([Constraint::Fill(1)]);
    let table = Table::new(rows, widths)
        .header(header)
        .block(panel(format!(" processes · {} ", status.clients.len())));
    frame.render_widget(table, area);
}

fn draw_receipts(frame: &mut Frame<'_>, area: Rect, status: &Status) {
    let lines: Vec<Line<'static>> = status
        .receipts
        .iter()
        .rev()
        .take(usize::from(BOTTOM) - 1)
        .map(|receipt| {
            let refused = receipt.refused_bytes();
            let parts = receipt.steps().into_iter().filter(|(_, bytes)| *bytes > 0);
            let parts: Vec<String> = parts
                .map(|(how, bytes)| format!("{} {how}", Bytes(bytes)))
                .collect();
            let origin = receipt.origin.to_string();
            let mut line = Line::from(format!(
                " #{:<4}{:<8} {:>5} asked, {:>5} back",
                receipt.id,
                origin.trim_start_matches("the "),
                Bytes(receipt.asked).to_string(),
                Bytes(receipt.returned).to_string(),
            ));
            if refused > 0 {
                let text = format!(", {} refused", Bytes(refused));
                line.push_span(Span::styled(text, Style::new().fg(ALERT)));
            }
            let how = format!(
                "  {:>8}  {}",
                duration(receipt.duration_us),
                parts.join(", ")
            );
            line.push_span(how);
            line
        })
        .collect();
    frame.render_widget(
        Paragraph::new(lines).block(panel(format!(" receipts · {} ", status.counters.recalls))),
        area,
    );
}

/// Waits for granules that moved: a bar for each power of two.
fn draw_stalls(frame: &mut Frame<'_>, area: Rect, status: &Status) {
    const ROWS: usize = 4;
    let waits = &status.total.stalls;
    let most = waits.iter().copied().max().unwrap_or(0);
    let mut lines: Vec<Line<'static>> = (0..ROWS)
        .rev()
        .map(|row| Line::from(bar_row(waits, most, row, ROWS)))
        .collect();
    lines.push(Line::from(format!(" {:<9}{:<10}1s", "2us", "1ms")).dim());
    let worst = status.clients.iter().map(|c| c.stats.move_stall_max_ns);
    lines.push(Line::from(format!(
        " half ≤ {}, 99% ≤ {}, worst {}",
        quantile(waits, 0.5),
        quantile(waits, 0.99),
        duration(worst.max().unwrap_or(0) / 1000),
    )));
    let count: u64 = waits.iter().sum();
    let block = panel(format!(" stalls · {count} "));
    frame.render_widget(Paragraph::new(lines).block(block), area);
}

fn bar_row(waits: &[u64; STALL_BUCKETS], most: u64, row: usize, rows: usize) -> String {
    let eighths = rows * BARS.len();
    let bars = waits.iter().map(|&count| {
        let height = (u128::from(count) * eighths as u128).div_ceil(u128::from(most.max(1)));
        match (height as usize).saturating_sub(row * BARS.len()) {
            0 => ' ',
            part => BARS[part.min(BARS.len()) - 1],
        }
    });
    std::iter::once(' ').chain(bars).collect()
}

/// The end of the bucket that `share` of all waits do not exceed.
fn quantile(waits: &[u64; STALL_BUCKETS], share: f64) -> String {
    let count: u64 = waits.iter().sum();
    if count == 0 {
        return "-".to_owned();
    }
    let wanted = (count as f64 * share).ceil() as u64;
    let mut seen = 0;
    let bucket = waits.iter().position(|waits| {
        seen += waits;
        seen >= wanted
    });
    match bucket {
        Some(bucket) if bucket + 1 < STALL_BUCKETS => {
            duration((1u64 << (STALL_FIRST_POWER + bucket as u32)) / 1000)
        }
        _ => "more".to_owned(),
    }
}

#[cfg(test)]
mod tests;
