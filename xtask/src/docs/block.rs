//! Fenced code blocks of Markdown.

use anyhow::{Result, bail};

/// A code block as it stands in a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Block {
    /// Line of its opening fence, from 1.
    pub(super) line: usize,
    /// First word after the fence.
    pub(super) language: String,
    /// Why it can't run here: ```` ```console skip="needs a CXL device" ````.
    pub(super) skip: Option<String>,
    /// What its text is called by the commands below it: ```` ```c file="hello.c" ````.
    pub(super) file: Option<String>,
    pub(super) text: String,
}

/// A command of a `console` block, and what the page shows of its output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) command: String,
    pub(super) output: Vec<String>,
}

/// All blocks of a page.
pub(super) fn blocks(page: &str) -> Result<Vec<Block>> {
    let mut blocks = Vec::new();
    let mut lines = page.lines().enumerate();
    while let Some((index, line)) = lines.next() {
        let Some(info) = line.trim_start().strip_prefix("```") else {
            continue;
        };
        let line = index + 1;
        let (language, rest) = info.split_once(' ').unwrap_or((info, ""));
        let value = rest
            .split_once("=\"")
            .and_then(|(_, value)| value.strip_suffix('"'));
        let (skip, file) = match (rest.split_once('=').map(|(name, _)| name), value) {
            (Some("skip"), Some(reason)) if !reason.is_empty() => (Some(reason.to_owned()), None),
            (Some("file"), Some(name)) if !name.is_empty() => (None, Some(name.to_owned())),
            _ if rest.is_empty() => (None, None),
            _ => bail!("line {line}: `{rest}` is neither skip=\"REASON\" nor file=\"NAME\""),
        };
        let mut text = String::new();
        loop {
            match lines.next() {
                Some((_, line)) if line.trim_start().starts_with("```") => break,
                Some((_, line)) => text = text + line + "\n",
                None => bail!("line {line}: the block has no end"),
            }
        }
        blocks.push(Block {
            line,
            language: language.to_owned(),
            skip,
            file,
            text,
        });
    }
    Ok(blocks)
}

/// The commands of a `console` block: `$ ` before each, a backslash at the end
/// of a line that goes on, output below.
pub(super) fn steps(text: &str) -> Result<Vec<Step>> {
    let mut steps: Vec<Step> = Vec::new();
    let mut open = false;
    for line in text.lines() {
        match (line.strip_prefix("$ "), steps.last_mut()) {
            (Some(command), _) if !open => steps.push(Step {
                command: command.to_owned(),
                output: Vec::new(),
            }),
            (_, Some(step)) if open => step.command = format!("{}\n{line}", step.command),
            (_, Some(step)) => step.output.push(line.to_owned()),
            (_, None) => bail!("`{line}` is before the first `$ `"),
        }
        open = line.ends_with('\\');
    }
    Ok(steps)
}

impl Step {
    /// Without the remark that explains it to the reader.
    pub(super) fn runs_in_background(&self) -> bool {
        let command = self.command.split(" # ").next().unwrap_or_default();
        command.trim_end().ends_with('&') && !command.trim_end().ends_with("&&")
    }

    /// Whether `printed` has the lines that the page shows, in that order.
    /// `…` in a line stands for anything, a line of its own for any lines.
    pub(super) fn shows(&self, printed: &str) -> Result<(), String> {
        let mut rest = printed.lines();
        for wanted in self.output.iter().filter(|line| !line.trim().is_empty()) {
            if wanted.trim() != "…" && !rest.any(|line| alike(wanted, line)) {
                return Err(wanted.clone());
            }
        }
        Ok(())
    }
}

/// Whether `line` is `wanted`, where `…` stands for anything.
fn alike(wanted: &str, line: &str) -> bool {
    let wanted = wanted.split_whitespace().collect::<Vec<_>>().join(" ");
    let line = line.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut parts = wanted.split('…');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = line.strip_prefix(first) else {
        return false;
    };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else {
        return rest.is_empty();
    };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_have_language_reason_and_line() {
        let page = "text\n```console\n$ true\n```\n\n```c skip=\"needs hardware\"\nint x;\n```\n";
        let found = blocks(page).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(
            (found[0].line, &*found[0].language, &*found[0].text),
            (2, "console", "$ true\n")
        );
        assert_eq!(found[1].skip.as_deref(), Some("needs hardware"));
        let found = blocks("```c file=\"a.c\"\n```\n").unwrap();
        assert_eq!(found[0].file.as_deref(), Some("a.c"));
        assert!(blocks("```c hidden\n```\n").is_err());
        assert!(blocks("```c skip=\"\"\n```\n").is_err());
        assert!(blocks("```c\n").is_err());
    }

    #[test]
    fn commands_go_on_after_a_backslash() {
        let found = steps("$ one \\\n    two\nout\n$ three &\n").unwrap();
        assert_eq!(found[0].command, "one \\\n    two");
        assert_eq!(found[0].output, ["out"]);
        assert!(found[1].runs_in_background() && !found[0].runs_in_background());
        assert!(steps("out\n$ one\n").is_err());
    }

    #[test]
    fn shown_output_must_come_in_order() {
        let step = |shown: &[&str]| Step {
            command: String::new(),
            output: shown.iter().map(|line| (*line).to_owned()).collect(),
        };
        let printed = "asked     64M (recall #1, 2.5 ms)\nreturned  64M: 64M free\nrefused   0B\n";
        assert!(
            step(&["asked 64M (recall #1, …)", "refused   0B"])
                .shows(printed)
                .is_ok()
        );
        assert!(step(&["refused 0B", "asked …"]).shows(printed).is_err());
        assert!(step(&["asked 64M"]).shows(printed).is_err());
        assert!(step(&["…", "returned … free"]).shows(printed).is_ok());
    }
}
