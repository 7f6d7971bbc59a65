//! What a program has written to a terminal, as a picture.

use std::fmt::Write;

use vt100::{Cell, Color, Parser};

/// A character, in pixels.
const WIDTH: f32 = 8.4;
const HEIGHT: u16 = 17;
const INK: &str = "#d5d8d6";
const PAPER: &str = "#14171a";

/// How a cell looks.
#[derive(PartialEq)]
struct Look {
    ink: String,
    bold: bool,
    inverse: bool,
    faint: bool,
}

/// The screen at the end of `written`, as SVG.
pub(super) fn svg(written: &str, rows: u16, columns: u16) -> String {
    let mut terminal = Parser::new(rows, columns, 0);
    terminal.process(written.as_bytes());
    let screen = terminal.screen();
    let (width, height) = (f32::from(columns) * WIDTH + 20.0, rows * HEIGHT + 20);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height}\" \
         font-family=\"DejaVu Sans Mono, monospace\" font-size=\"14\">\n\
         <rect width=\"100%\" height=\"100%\" rx=\"8\" fill=\"{PAPER}\"/>\n"
    );
    for row in 0..rows {
        let mut column = 0;
        while column < columns {
            let from = column;
            let first = look(screen.cell(row, from));
            let mut text = String::new();
            while column < columns && look(screen.cell(row, column)) == first {
                let contents = screen.cell(row, column).map_or("", Cell::contents);
                text += if contents.is_empty() { " " } else { contents };
                column += 1;
            }
            run(&mut svg, (row, from, column - from), &text, &first);
        }
    }
    svg + "</svg>\n"
}

/// Neighbours that look alike.
fn run(svg: &mut String, (row, from, cells): (u16, u16, u16), text: &str, look: &Look) {
    if text.trim().is_empty() && !look.inverse {
        return;
    }
    let (x, y) = (10.0 + f32::from(from) * WIDTH, 10 + row * HEIGHT);
    let width = f32::from(cells) * WIDTH;
    let (mut ink, mut more) = (&*look.ink, String::new());
    // Writing to a string can't fail.
    if look.inverse {
        let _ = writeln!(
            svg,
            "<rect x=\"{x:.1}\" y=\"{y}\" width=\"{width:.1}\" height=\"{HEIGHT}\" fill=\"{ink}\"/>"
        );
        ink = PAPER;
    }
    if look.bold {
        more += " font-weight=\"bold\"";
    }
    if look.faint {
        more += " opacity=\"0.6\"";
    }
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{}\" textLength=\"{width:.1}\" lengthAdjust=\"spacingAndGlyphs\" \
         xml:space=\"preserve\" fill=\"{ink}\"{more}>{text}</text>",
        y + 13
    );
}

fn look(cell: Option<&Cell>) -> Look {
    let ink = match cell.map_or(Color::Default, Cell::fgcolor) {
        Color::Default => INK.to_owned(),
        Color::Rgb(red, green, blue) => format!("#{red:02x}{green:02x}{blue:02x}"),
        Color::Idx(index) => indexed(index),
    };
    Look {
        ink,
        bold: cell.is_some_and(Cell::bold),
        inverse: cell.is_some_and(Cell::inverse),
        faint: cell.is_some_and(Cell::dim),
    }
}

/// The 256 colours of xterm; of the first sixteen, grey will do.
fn indexed(index: u8) -> String {
    let step = |n: u8| if n == 0 { 0 } else { 55 + n * 40 };
    let (red, green, blue) = match index {
        0..16 => (0xd5, 0xd8, 0xd6),
        16..232 => {
            let n = index - 16;
            (step(n / 36), step(n / 6 % 6), step(n % 6))
        }
        _ => {
            let grey = 8 + (index - 232) * 10;
            (grey, grey, grey)
        }
    };
    format!("#{red:02x}{green:02x}{blue:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_keeps_its_place_and_colour() {
        let svg = svg("\x1b[2;3H\x1b[38;5;203ma<b\x1b[0m c", 3, 10);
        assert!(svg.contains(">a&lt;b</text>"), "{svg}");
        assert!(svg.contains("x=\"26.8\" y=\"40\""), "{svg}");
        assert!(svg.contains("fill=\"#ff5f5f\""), "{svg}");
    }
}
