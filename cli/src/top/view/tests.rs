use std::time::{Duration, Instant};

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;

use super::*;
use crate::top::sample::status;

fn drawn(flow: &Flow, width: u16, height: u16) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, flow)).unwrap();
    terminal.backend().buffer().clone()
}

fn text(buffer: &Buffer) -> String {
    let width = usize::from(buffer.area.width);
    let symbols: Vec<&str> = buffer.content().iter().map(|cell| cell.symbol()).collect();
    let rows: Vec<String> = symbols.chunks(width).map(|row| row.concat()).collect();
    rows.join("\n")
}

fn seen() -> Flow {
    let mut flow = Flow::default();
    flow.saw(status(), Instant::now());
    flow
}

#[test]
fn the_map_shows_who_holds_what() {
    let buffer = drawn(&seen(), 132, 36);
    let text = text(&buffer);
    for part in [
        "0x10000000    16M  75%  ■■■■■■░·",
        "0x11000000     8M  25%  ◂···",
        "a cell is 2M",
        "recall #9 by the operator: 2M of 8M back, 1.2 s left, asking 42 for 2M",
        "valkey-server",
        "#8   device      6M asked,    4M back, 2M refused    2.5 ms  2M free, 2M moved",
        "half ≤ 65 us, 99% ≤ 2.1 ms, worst 1.5 ms",
        " q quit",
    ] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    let row: Vec<_> = buffer
        .content()
        .chunks(132)
        .find(|row| row.iter().any(|cell| cell.symbol() == "░"))
        .unwrap()
        .iter()
        .filter(|cell| cell.symbol() == "■")
        .map(|cell| cell.fg)
        .collect();
    assert_eq!(row[..4], [map::colour(Some(0)); 4]);
    assert_eq!(row[4..], [map::colour(Some(1)); 2]);
}

#[test]
fn rates_are_what_changed_since() {
    let start = Instant::now();
    let mut flow = Flow::default();
    flow.saw(status(), start);
    let mut later = status();
    later.clients[1].stats.evacuated_granules += 16;
    flow.saw(later, start + Duration::from_secs(2));
    assert_eq!(flow.moves(42).out, 16.0 * (2 << 20) as f64 / 2.0);
    assert_eq!(flow.moves(41), super::super::flow::Moves::default());
    assert!(text(&drawn(&flow, 120, 36)).contains("16M/s"));
}

#[test]
fn a_broker_that_goes_away_is_said_and_the_last_look_stays() {
    let mut flow = seen();
    flow.lost("the connection was closed".into());
    let text = text(&drawn(&flow, 120, 36));
    assert!(
        text.contains("no answer: the connection was closed"),
        "{text}"
    );
    assert!(text.contains("valkey-server"));
    let mut never = Flow::default();
    never.lost("nobody is there".into());
    assert!(super::tests::text(&drawn(&never, 40, 5)).contains("nobody is there"));
}

#[test]
fn extents_that_do_not_fit_are_counted() {
    let mut many = status();
    let extent = many.extents[1].clone();
    many.extents.resize(30, extent);
    let mut flow = Flow::default();
    flow.saw(many, Instant::now());
    let text = text(&drawn(&flow, 120, 30));
    assert_eq!(text.matches("0x1").count(), 1 + 12, "{text}");
    assert!(text.contains(" and 18 lines more"), "{text}");
}

#[test]
fn no_size_of_terminal_is_too_small() {
    for (width, height) in [(1, 1), (10, 3), (40, 12), (80, 24), (300, 100)] {
        drawn(&seen(), width, height);
    }
}
