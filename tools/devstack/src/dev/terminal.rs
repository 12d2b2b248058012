//! Draws a trace for the terminal: the tree, and for each span its kind, its status, its duration, and a bar
//! that shows when the span ran. If the terminal is too narrow, the bars are drawn shorter. If it is narrower
//! still, the kinds are left out and the names are cut, then the bars are left out, and then the durations.

use harness::trace::Span;
use rustix::{stdio::stdout, termios::tcgetwinsize};
use std::{
    borrow::Cow,
    collections::HashSet,
    env,
    fmt::Write,
    io::{self, IsTerminal},
    time::Duration,
};

/// The largest and the smallest width of the column of bars, in characters.
const BARS: [usize; 2] = [24, 10];

/// The smallest width of the column of names before other columns are left out, in characters. The width
/// includes the indentation.
const NAMES: usize = 20;

/// The widths of other columns, in characters.
const KIND: usize = 8;
const DURATION: usize = 8;

/// Traces with more spans than this are not drawn. Only their titles are printed, and the page shows their
/// spans.
pub const MAX_SPANS: usize = 200;

const RED: u8 = 31;
const DIM: u8 = 2;
const BOLD: u8 = 1;
/// ANSI codes of the services' colours, in the order of the services' first spans. Red is reserved for errors.
const COLOURS: [u8; 5] = [36, 33, 35, 32, 34];

/// Draws traces for a terminal.
#[derive(Debug, Clone, Copy)]
pub struct Terminal {
    /// Whether to use ANSI escapes.
    pub colour: bool,
    /// The number of columns.
    pub width: usize,
}

impl Terminal {
    /// Describes the current terminal. If the output is not a terminal, traces are drawn in 120 columns,
    /// without colours.
    pub fn now() -> Self {
        let no_color = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let width = tcgetwinsize(stdout()).map_or(0, |size| usize::from(size.ws_col));
        Self { colour: io::stdout().is_terminal() && !no_color, width: if width == 0 { 120 } else { width } }
    }

    /// Draws a line about the trace, then a line for each span. The spans in `known` were drawn before. If
    /// there are any, draws only the new spans, marked with a `+`, and the ancestors of these spans. `url` is
    /// the URL of the trace's page.
    pub fn draw(&self, spans: &[Span], known: &HashSet<String>, url: &str) -> String {
        let start = spans.iter().map(|span| span.start).min().unwrap_or_default();
        let end = spans.iter().map(|span| span.end.max(span.start)).max().unwrap_or_default();
        let new = spans.iter().filter(|span| !known.contains(&span.span_id)).count();
        let new = if known.is_empty() { 0 } else { new };
        let mut out = self.title(spans, new, end - start, url);
        if spans.len() > MAX_SPANS {
            return out;
        }
        let mut rows = Vec::new();
        let is_root = |span: &&Span| !spans.iter().any(|parent| parent.span_id == span.parent_span_id);
        for root in in_order(spans.iter().filter(is_root).collect()) {
            add_rows(&mut rows, spans, known, root, "", "");
        }
        let drawing = Drawing::new(self, &rows, start, end);
        for row in rows.iter().filter(|row| row.is_drawn) {
            drawing.row(&mut out, row);
        }
        out
    }

    fn title(&self, spans: &[Span], new: usize, length: u64, url: &str) -> String {
        let errors = spans.iter().filter(|span| span.status == "ERROR").count();
        let number = |n, what| if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") };
        let mut title = format!("{}, {}", duration(length), number(spans.len(), "span"));
        if new > 0 {
            let _ = write!(title, " ({new} new)");
        }
        let errors = if errors > 0 { format!(", {}", number(errors, "error")) } else { String::new() };
        let room = self.width.saturating_sub(url.chars().count());
        let (space, url) = match room {
            _ if room >= title.chars().count() + errors.len() + 2 => ("  ", url),
            2.. => ("\n  ", url),
            // Part of a URL would be useless, so only the trace id is shown, by which the page finds the trace.
            _ => ("\n  ", url.rsplit('/').next().unwrap_or_default()),
        };
        format!("{}{}{space}{}\n", self.paint(BOLD, &title), self.paint(RED, &errors), self.paint(DIM, url))
    }

    fn paint(&self, code: u8, text: &str) -> String {
        if self.colour && code > 0 && !text.trim().is_empty() {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

/// A span in its place in the tree.
struct Row<'a> {
    span: &'a Span,
    /// The name of the span, after the lines of the tree that are drawn before it.
    name: String,
    is_new: bool,
    is_drawn: bool,
}

/// Adds a span and the spans below it. `lead` is drawn before the span's name, `below` before the names of its
/// children. Returns whether a new span is among them.
fn add_rows<'a>(
    rows: &mut Vec<Row<'a>>,
    spans: &'a [Span],
    known: &HashSet<String>,
    span: &'a Span,
    lead: &str,
    below: &str,
) -> bool {
    let (index, is_new) = (rows.len(), !known.contains(&span.span_id));
    let name = format!("{lead}{}", printable(&name(span)));
    rows.push(Row { span, name, is_new: is_new && !known.is_empty(), is_drawn: is_new });
    let children = spans.iter().filter(|child| child.parent_span_id == span.span_id);
    let children = in_order(children.filter(|child| child.span_id != span.span_id).collect());
    let last = children.len().saturating_sub(1);
    for (i, child) in children.into_iter().enumerate() {
        let (branch, beyond) = if i == last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        rows[index].is_drawn |=
            add_rows(rows, spans, known, child, &format!("{below}{branch}"), &format!("{below}{beyond}"));
    }
    rows[index].is_drawn
}

/// Returns the span's name. If a request has no route, its path is added.
fn name(span: &Span) -> Cow<'_, str> {
    let path = span.attributes.get("url.path").filter(|_| !span.attributes.contains_key("http.route"));
    path.map_or(Cow::Borrowed(&span.name), |path| format!("{} {path}", span.name).into())
}

/// Returns a text (the status of a request or a call, the reason for an error, or both) and whether this
/// outcome is a failure.
fn outcome(span: &Span) -> (String, bool) {
    let is_error = span.status == "ERROR";
    let of =
        |keys: &[&str]| keys.iter().find_map(|key| span.attributes.get(*key)).filter(|text| !text.is_empty());
    let status = of(&["http.response.status_code", "rpc.response.status_code", "rpc.status_code"]);
    let reason = of(&["error.type"]).filter(|_| is_error);
    let text = match (status, reason) {
        (Some(status), Some(reason)) if status != reason => format!("{status} {reason}"),
        (Some(text), _) | (None, Some(text)) => text.clone(),
        (None, None) if is_error && !span.status_message.is_empty() => span.status_message.clone(),
        (None, None) => if is_error { "error" } else { "" }.to_owned(),
    };
    let is_refusal =
        span.attributes.get("http.response.status_code").is_some_and(|code| code.as_str() >= "400");
    (printable(&text), is_error || is_refusal)
}

/// The widths of the columns. A column of width 0 is left out.
struct Drawing<'a> {
    terminal: &'a Terminal,
    /// The start of the trace, in nanoseconds.
    start: u64,
    /// The duration of the trace in nanoseconds, at least 1.
    length: u64,
    services: Vec<&'a str>,
    service: usize,
    name: usize,
    kind: usize,
    outcome: usize,
    duration: usize,
    bar: usize,
}

impl<'a> Drawing<'a> {
    fn new(terminal: &'a Terminal, rows: &[Row<'a>], start: u64, end: u64) -> Self {
        let longest = |widths: &mut dyn Iterator<Item = usize>| widths.max().unwrap_or(0);
        let mut services: Vec<&str> = Vec::new();
        for row in rows {
            if !services.contains(&row.span.service.as_str()) {
                services.push(&row.span.service);
            }
        }
        let service =
            longest(&mut services.iter().map(|service| service.chars().count())).min(terminal.width / 6);
        let outcome =
            longest(&mut rows.iter().map(|row| outcome(row.span).0.chars().count())).min(terminal.width / 4);
        let names = longest(&mut rows.iter().map(|row| row.name.chars().count()));

        // Two spaces precede each column.
        let column = |width: usize| if width > 0 { width + 2 } else { 0 };
        let room = terminal.width.saturating_sub(column(service) + 2 + column(outcome));
        let fits = |width: usize| width <= room;
        let (kind, duration, bar) = if fits(names + column(KIND) + column(DURATION) + column(BARS[1])) {
            (KIND, DURATION, BARS[1])
        } else if fits(NAMES + column(DURATION) + column(BARS[1])) {
            (0, DURATION, BARS[1])
        } else if fits(NAMES + column(DURATION)) {
            (0, DURATION, 0)
        } else {
            (0, 0, 0)
        };
        let name = names.min(room - (column(kind) + column(duration) + column(bar)).min(room));
        let left = room.saturating_sub(name + column(kind) + column(duration) + column(bar));
        let bar = if bar > 0 { (bar + left).min(BARS[0]) } else { 0 };
        let length = (end - start).max(1);
        Self { terminal, start, length, services, service, name, kind, outcome, duration, bar }
    }

    fn row(&self, out: &mut String, row: &Row<'_>) {
        let (span, terminal) = (row.span, self.terminal);
        let position = self.services.iter().position(|service| *service == span.service).unwrap_or(0);
        let colour = COLOURS[position % COLOURS.len()];
        let (outcome, has_failed) = outcome(span);
        let red = |or| if has_failed { RED } else { or };
        let took = duration(span.end.saturating_sub(span.start));
        let columns = [
            (self.service, colour, fit(&span.service, self.service)),
            (self.name, red(0), fit(&row.name, self.name)),
            (self.kind, 0, fit(span.kind, self.kind)),
            (self.outcome, red(0), fit(&outcome, self.outcome)),
            (self.duration, 0, format!("{took:>DURATION$}")),
            (self.bar, red(colour), self.bar(span)),
        ];
        out.push_str(if row.is_new { "+ " } else { "  " });
        let columns = columns.into_iter().filter(|(width, ..)| *width > 0);
        let texts: Vec<_> = columns.map(|(_, code, text)| terminal.paint(code, &text)).collect();
        out.push_str(texts.join("  ").trim_end());
        out.push('\n');
    }

    /// Draws a bar that shows when the span began within its trace and how long it lasted. The shortest bar is
    /// a thin mark.
    fn bar(&self, span: &Span) -> String {
        let cells = |nanoseconds: u64| nanoseconds as f64 / self.length as f64 * self.bar as f64;
        let from = (cells(span.start.saturating_sub(self.start)) as usize).min(self.bar.saturating_sub(1));
        let length = cells(span.end.saturating_sub(span.start)).round() as usize;
        let bar = if length == 0 { "▏".to_owned() } else { "█".repeat(length.min(self.bar - from)) };
        format!("{}{bar}", " ".repeat(from))
    }
}

fn in_order(mut spans: Vec<&Span>) -> Vec<&Span> {
    spans.sort_by_key(|span| span.start);
    spans
}

/// Shortens or pads a text to `width` characters. A long text loses its middle, because the names of spans
/// differ most at their ends.
fn fit(text: &str, width: usize) -> String {
    let text: Vec<char> = printable(text).chars().collect();
    if text.len() <= width {
        return format!("{:<width$}", text.iter().collect::<String>());
    }
    let kept = width.saturating_sub(1);
    let (begin, end) = (&text[..kept - kept / 2], &text[text.len() - kept / 2..]);
    begin.iter().chain(&['…']).chain(end).collect()
}

/// Replaces control characters. Anybody can send spans, but escape sequences in spans must not reach the
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

    const PLAIN: Terminal = Terminal { colour: false, width: 72 };

    fn known(ids: &[&str]) -> HashSet<String> {
        ids.iter().map(|id| (*id).to_owned()).collect()
    }

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
        let drawn = Terminal { width: 80, ..PLAIN }.draw(&spans, &known(&[]), "http://here/trace/1");
        let expected = [
            "12.0 ms, 5 spans, 1 error  http://here/trace/1",
            "  api         login          INTERNAL             8.0 ms  ███████████████",
            "  api         ├─ find        INTERNAL             4.0 ms   ███████",
            "  usercenter  │  └─ find     INTERNAL             2.0 ms     ████",
            "  api         └─ send        INTERNAL  timeout    2.0 ms             ████",
            "  mq             └─ consume  INTERNAL             3.0 ms                  ██████",
        ];
        assert_eq!(drawn.lines().collect::<Vec<_>>(), expected, "{drawn}");

        // mq's span came late.
        let late = PLAIN.draw(&spans, &known(&["a", "b", "c", "d"]), "http://here/trace/1");
        let names = |line: &str| line.split_whitespace().take(4).collect::<Vec<_>>().join(" ");
        let expected =
            ["12.0 ms, 5 spans", "api login INTERNAL 8.0", "api └─ send INTERNAL", "+ mq └─ consume"];
        assert_eq!(late.lines().map(names).collect::<Vec<_>>(), expected, "{late}");
    }

    #[test]
    fn a_tree_is_as_wide_as_the_terminal_at_most_and_keeps_the_ends_of_names_and_every_status() {
        let mut spans = vec![span("a", "", "api", "POST", (0, 8))];
        spans[0].attributes.insert("http.response.status_code".to_owned(), "503".to_owned());
        spans[0].attributes.insert("url.path".to_owned(), "/no/such/path".to_owned());
        for id in ["b", "c", "d"] {
            let parent = spans[spans.len() - 1].span_id.clone();
            let mut span =
                span(id, &parent, "usercenter", "usercenter.v1.Usercenter/GetUserByMobile", (1, 5));
            span.attributes.insert("rpc.response.status_code".to_owned(), "UNAVAILABLE".to_owned());
            span.status = "ERROR";
            spans.push(span);
        }
        let url = format!("http://localhost:16686/trace/{}", "0".repeat(32));
        for (width, status) in [(120, "UNAVAILABLE"), (80, "UNAVAILABLE"), (40, "UNAVA…ABLE")] {
            let drawn = Terminal { colour: false, width }.draw(&spans, &known(&[]), &url);
            let widest = drawn.lines().map(|line| line.chars().count()).max();
            assert!(widest <= Some(width), "{widest:?} of {width}:\n{drawn}");
            assert_eq!(drawn.matches(status).count(), 3, "{drawn}");
            assert_eq!(drawn.matches("Mobile ").count(), 3, "{drawn}");
            assert_eq!(drawn.matches("/path ").count(), 1, "{drawn}");
            assert_eq!(drawn.matches(" 503").count(), 1, "{drawn}");
        }
        for width in 0..40 {
            Terminal { colour: false, width }.draw(&spans, &known(&[]), &url);
        }
    }

    #[test]
    fn colour_is_used_only_if_asked_for_and_failures_are_red() {
        let mut spans = [span("a", "", "api", "login", (0, 8))];
        assert!(!PLAIN.draw(&spans, &known(&[]), "").contains('\x1b'));
        let colour = Terminal { colour: true, ..PLAIN };
        assert!(colour.draw(&spans, &known(&[]), "").contains("\x1b[36mapi"));
        assert!(!colour.draw(&spans, &known(&[]), "").contains("\x1b[31m"));
        spans[0].attributes.insert("http.response.status_code".to_owned(), "404".to_owned());
        assert!(colour.draw(&spans, &known(&[]), "").contains("\x1b[31m404"));
    }

    #[test]
    fn hostile_spans_are_drawn_without_escapes_and_come_to_an_end() {
        let mut evil = span("a", "", "api\x1b[2J", "login\n\x07", (9, 3));
        evil.status = "ERROR";
        evil.status_message = "\x1b]0;owned\x07".to_owned();
        evil.attributes.insert("url.path".to_owned(), "\x1b[2J".to_owned());
        let mut spans = vec![evil, span("b", "b", "x", "own parent", (u64::MAX / 1_000_000, 0))];
        spans.extend([span("c", "d", "x", "cycle", (0, 1)), span("d", "c", "x", "cycle", (0, 1))]);
        let drawn = PLAIN.draw(&spans, &known(&[]), "");
        assert!(drawn.chars().all(|c| c == '\n' || !c.is_control()), "{drawn:?}");

        let deep: Vec<_> =
            (0..100_000).map(|i| span(&i.to_string(), &(i - 1).to_string(), "x", "deep", (0, 1))).collect();
        assert_eq!(PLAIN.draw(&deep, &known(&[]), "").lines().count(), 1);
        assert_eq!(PLAIN.draw(&[], &known(&[]), "").lines().count(), 1);
    }
}
