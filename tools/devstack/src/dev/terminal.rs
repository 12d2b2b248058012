//! Draws a trace for the terminal: the tree, and for each span its kind, its duration, and a bar that shows
//! when it ran.

use harness::trace::Span;
use std::{fmt::Write, time::Duration};

/// The width of a bar that lasts as long as the trace, in characters.
const BAR: usize = 24;

/// The width of the column of names, indentation included, in characters.
const NAMES: usize = 52;

/// How many spans of a trace are drawn at most. The page shows larger traces.
const MAX_SPANS: usize = 200;

const RED: u8 = 31;
const DIM: u8 = 2;
const BOLD: u8 = 1;
/// ANSI codes of the services' colours, in the order of the services' first spans. Red is left for errors.
const COLOURS: [u8; 5] = [36, 33, 35, 32, 34];

/// Draws traces, with colour or without.
#[derive(Debug, Clone, Copy)]
pub struct Terminal {
    /// Whether to use ANSI escapes.
    pub colour: bool,
}

impl Terminal {
    /// Draws the whole trace: a line about the trace, then a line for each span. `url` is the trace's page.
    pub fn draw(&self, spans: &[Span], url: &str) -> String {
        let start = spans.iter().map(|span| span.start).min().unwrap_or_default();
        let end = spans.iter().map(|span| span.end.max(span.start)).max().unwrap_or_default();
        let mut out = self.title(spans, end - start, url);
        if spans.len() > MAX_SPANS {
            return out;
        }
        let mut services: Vec<&str> = Vec::new();
        for span in in_order(spans.iter().collect()) {
            if !services.contains(&span.service.as_str()) {
                services.push(&span.service);
            }
        }
        let service_width = services.iter().map(|service| service.chars().count()).max().unwrap_or(0).min(20);
        let drawing =
            Drawing { terminal: self, spans, start, length: (end - start).max(1), services, service_width };

        let is_root = |span: &&Span| !spans.iter().any(|parent| parent.span_id == span.parent_span_id);
        let roots = in_order(spans.iter().filter(is_root).collect());
        for root in roots {
            drawing.span(&mut out, root, "", "");
        }
        out
    }

    fn title(&self, spans: &[Span], length: u64, url: &str) -> String {
        let errors = spans.iter().filter(|span| span.status == "ERROR").count();
        let number = |n, what| if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") };
        let title = format!("{}, {}", duration(length), number(spans.len(), "span"));
        let errors = match errors {
            0 => String::new(),
            n => self.paint(RED, &format!(", {}", number(n, "error"))),
        };
        format!("{}{errors}  {}\n", self.paint(BOLD, &title), self.paint(DIM, url))
    }

    fn paint(&self, code: u8, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

struct Drawing<'a> {
    terminal: &'a Terminal,
    spans: &'a [Span],
    start: u64,
    /// The duration of the trace in nanoseconds, at least 1.
    length: u64,
    services: Vec<&'a str>,
    service_width: usize,
}

impl Drawing<'_> {
    /// Draws a span and the spans below it. `lead` is drawn before the span's name, `below` before the names of
    /// its children.
    fn span(&self, out: &mut String, span: &Span, lead: &str, below: &str) {
        let terminal = self.terminal;
        let position = self.services.iter().position(|service| *service == span.service).unwrap_or(0);
        let colour = COLOURS[position % COLOURS.len()];
        let service = fit(&span.service, self.service_width);
        let room = NAMES.saturating_sub(lead.chars().count());
        let name = fit(&span.name, room);
        let error = span.status == "ERROR";
        let name = if error { terminal.paint(RED, &name) } else { name };
        let _ = write!(
            out,
            "  {}  {lead}{name}  {:<8}  {:>8}  {}",
            terminal.paint(colour, &service),
            span.kind,
            duration(span.end.saturating_sub(span.start)),
            terminal.paint(if error { RED } else { colour }, &self.bar(span)),
        );
        if error {
            let reason = span.attributes.get("error.type").unwrap_or(&span.status_message);
            let _ = write!(out, "  {}", terminal.paint(RED, &printable(reason)));
        }
        out.truncate(out.trim_end().len());
        out.push('\n');

        let children = self.spans.iter().filter(|child| child.parent_span_id == span.span_id);
        let children = in_order(children.filter(|child| child.span_id != span.span_id).collect());
        let last = children.len().saturating_sub(1);
        for (i, child) in children.into_iter().enumerate() {
            let (branch, beyond) = if i == last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
            self.span(out, child, &format!("{below}{branch}"), &format!("{below}{beyond}"));
        }
    }

    /// Draws a bar that shows when the span began within its trace and how long it lasted. The shortest bar is
    /// a thin mark.
    fn bar(&self, span: &Span) -> String {
        let cells = |nanoseconds: u64| nanoseconds as f64 / self.length as f64 * BAR as f64;
        let from = (cells(span.start.saturating_sub(self.start)) as usize).min(BAR - 1);
        let length = cells(span.end.saturating_sub(span.start)).round() as usize;
        let bar = if length == 0 { "▏".to_owned() } else { "█".repeat(length.min(BAR - from)) };
        format!("{}{bar}", " ".repeat(from))
    }
}

fn in_order(mut spans: Vec<&Span>) -> Vec<&Span> {
    spans.sort_by_key(|span| span.start);
    spans
}

/// Cuts or pads a text to `width` characters.
fn fit(text: &str, width: usize) -> String {
    let text = printable(text);
    if text.chars().count() <= width {
        return format!("{text:<width$}");
    }
    let kept: String = text.chars().take(width.saturating_sub(1)).collect();
    format!("{kept}…")
}

/// Replaces control characters, because anybody can send spans, and their escapes must not reach the
/// terminal.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '·' } else { c }).collect()
}

fn duration(nanoseconds: u64) -> String {
    let duration = Duration::from_nanos(nanoseconds);
    match nanoseconds {
        0..1_000_000 => format!("{} µs", duration.as_micros()),
        1_000_000..1_000_000_000 => format!("{:.1} ms", duration.as_secs_f64() * 1e3),
        _ => format!("{:.2} s", duration.as_secs_f64()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(id: &str, parent: &str, service: &str, name: &str, times: (u64, u64)) -> Span {
        Span {
            span_id: id.to_owned(),
            parent_span_id: parent.to_owned(),
            service: service.to_owned(),
            name: name.to_owned(),
            kind: "INTERNAL",
            start: times.0 * 1_000_000,
            end: times.1 * 1_000_000,
            ..Span::default()
        }
    }

    const PLAIN: Terminal = Terminal { colour: false };

    #[test]
    fn a_tree_with_bars_where_the_spans_were() {
        let mut failed = span("d", "a", "api", "send", (6, 8));
        failed.status = "ERROR";
        failed.attributes.insert("error.type".to_owned(), "timeout".to_owned());
        // The spans are in no order, and a child may end after its parent.
        let spans = [
            failed,
            span("c", "b", "usercenter", "find", (2, 4)),
            span("a", "", "api", "login", (0, 8)),
            span("e", "d", "mq", "consume", (9, 12)),
            span("b", "a", "api", "find", (1, 5)),
        ];
        let drawn = PLAIN.draw(&spans, "http://here/trace/1");
        let expected = [
            "12.0 ms, 5 spans, 1 error  http://here/trace/1",
            "  api         login                    INTERNAL    8.0 ms  ████████████████",
            "  api         ├─ find                  INTERNAL    4.0 ms    ████████",
            "  usercenter  │  └─ find               INTERNAL    2.0 ms      ████",
            "  api         └─ send                  INTERNAL    2.0 ms              ████  timeout",
            "  mq             └─ consume            INTERNAL    3.0 ms                    ██████",
        ];
        // The column of names is too wide for the test's lines.
        let narrow = drawn.replace(&" ".repeat(NAMES - 23), "");
        assert_eq!(narrow.lines().collect::<Vec<_>>(), expected, "{drawn}");
    }

    #[test]
    fn colour_is_used_only_if_asked_for() {
        let spans = [span("a", "", "api", "login", (0, 8))];
        assert!(!PLAIN.draw(&spans, "").contains('\x1b'));
        assert!(Terminal { colour: true }.draw(&spans, "").contains("\x1b[36mapi"));
    }

    #[test]
    fn hostile_spans_are_drawn_without_escapes_and_come_to_an_end() {
        let mut evil = span("a", "", "api\x1b[2J", "login\n\x07", (9, 3));
        evil.status = "ERROR";
        evil.status_message = "\x1b]0;owned\x07".to_owned();
        let mut spans = vec![evil, span("b", "b", "x", "own parent", (u64::MAX / 1_000_000, 0))];
        spans.extend([span("c", "d", "x", "cycle", (0, 1)), span("d", "c", "x", "cycle", (0, 1))]);
        let drawn = PLAIN.draw(&spans, "");
        assert!(drawn.chars().all(|c| c == '\n' || !c.is_control()), "{drawn:?}");

        let deep: Vec<_> =
            (0..100_000).map(|i| span(&i.to_string(), &(i - 1).to_string(), "x", "deep", (0, 1))).collect();
        assert_eq!(PLAIN.draw(&deep, "").lines().count(), 1);
        assert_eq!(PLAIN.draw(&[], "").lines().count(), 1);
    }
}
