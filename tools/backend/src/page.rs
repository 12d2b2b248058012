//! Serves the page to a browser: the files of `page/`, which are embedded unchanged. Their scripts ask
//! `recent`, `jaeger` and `logs` for data.

use axum::{
    Router,
    http::header::{
        CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
    },
    response::{IntoResponse, Response},
    routing::get,
};

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const JAVASCRIPT: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

/// The Content-Security-Policy. It is a second protection against a span whose text would run as code. The
/// browser runs only scripts in files of this server, and text can't become markup (Trusted Types).
const POLICY: &str = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; \
                      object-src 'none'; require-trusted-types-for 'script'; trusted-types 'none'";

/// The path, the content type and the content of each file.
const FILES: [(&str, &str, &str); 29] = [
    ("/", HTML, include_str!("page/list.html")),
    ("/search", HTML, include_str!("page/list.html")),
    ("/trace/{id}", HTML, include_str!("page/trace.html")),
    ("/page/base.css", CSS, include_str!("page/base.css")),
    ("/page/list.css", CSS, include_str!("page/list.css")),
    ("/page/side.css", CSS, include_str!("page/side.css")),
    ("/page/trace.css", CSS, include_str!("page/trace.css")),
    ("/page/waterfall.css", CSS, include_str!("page/waterfall.css")),
    ("/page/icon.svg", SVG, include_str!("page/icon.svg")),
    ("/page/api.js", JAVASCRIPT, include_str!("page/api.js")),
    ("/page/details.js", JAVASCRIPT, include_str!("page/details.js")),
    ("/page/dom.js", JAVASCRIPT, include_str!("page/dom.js")),
    ("/page/events.js", JAVASCRIPT, include_str!("page/events.js")),
    ("/page/find.js", JAVASCRIPT, include_str!("page/find.js")),
    ("/page/format.js", JAVASCRIPT, include_str!("page/format.js")),
    ("/page/graph.js", JAVASCRIPT, include_str!("page/graph.js")),
    ("/page/jaeger.js", JAVASCRIPT, include_str!("page/jaeger.js")),
    ("/page/keys.js", JAVASCRIPT, include_str!("page/keys.js")),
    ("/page/list.js", JAVASCRIPT, include_str!("page/list.js")),
    ("/page/list_row.js", JAVASCRIPT, include_str!("page/list_row.js")),
    ("/page/overview.js", JAVASCRIPT, include_str!("page/overview.js")),
    ("/page/search.js", JAVASCRIPT, include_str!("page/search.js")),
    ("/page/services.js", JAVASCRIPT, include_str!("page/services.js")),
    ("/page/timeline.js", JAVASCRIPT, include_str!("page/timeline.js")),
    ("/page/timing.js", JAVASCRIPT, include_str!("page/timing.js")),
    ("/page/trace.js", JAVASCRIPT, include_str!("page/trace.js")),
    ("/page/tree.js", JAVASCRIPT, include_str!("page/tree.js")),
    ("/page/waterfall.js", JAVASCRIPT, include_str!("page/waterfall.js")),
    ("/page/waterfall_row.js", JAVASCRIPT, include_str!("page/waterfall_row.js")),
];

/// The files that only a page with controls has.
const CONTROLS: [(&str, &str, &str); 2] = [
    ("/page/controls.css", CSS, include_str!("page/controls.css")),
    ("/page/controls.js", JAVASCRIPT, include_str!("page/controls.js")),
];

/// The elements that a page with controls has in its HTML head.
const HEAD: &str = "<link rel=\"stylesheet\" href=\"/page/controls.css\">\n    \
                    <script type=\"module\" src=\"/page/controls.js\"></script>\n  ";

/// The element in the HTML head that names the path of Jaeger's page, or nothing in a build without that
/// page.
const JAEGER: &str =
    if cfg!(feature = "jaeger-ui") { "<meta name=\"jaeger\" content=\"/jaeger\">\n  " } else { "" };

pub(super) fn page() -> Router {
    with_files(Router::new(), &FILES, JAEGER)
}

/// Returns the page with controls. The controls call `routes`.
pub(super) fn page_with_controls(routes: Router) -> Router {
    with_files(routes, &[&FILES[..], &CONTROLS].concat(), &format!("{HEAD}{JAEGER}"))
}

/// Adds a route for each file. HTML files get `head` at the end of their head element.
fn with_files(router: Router, files: &[(&'static str, &'static str, &'static str)], head: &str) -> Router {
    let head = format!("{head}</head>");
    files.iter().fold(router, |router, &(path, content_type, content)| {
        let content =
            if content_type == HTML { content.replace("</head>", &head) } else { content.to_owned() };
        router.route(path, get(async move || file(content_type, content)))
    })
}

fn file(content_type: &'static str, content: impl IntoResponse) -> Response {
    let headers = [
        (CONTENT_TYPE, content_type),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        // The files of the next build have the same names, so a browser must always ask whether they have
        // changed.
        (CACHE_CONTROL, "no-cache"),
    ];
    (headers, content).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the quoted text after each `mark`.
    fn quoted<'a>(content: &'a str, mark: &str) -> Vec<&'a str> {
        content.split(mark).skip(1).filter_map(|rest| rest.split('"').next()).collect()
    }

    #[test]
    fn whatever_a_file_asks_for_is_served() {
        let mut asked = Vec::new();
        for content in FILES.into_iter().chain(CONTROLS).map(|(_, _, content)| content).chain([HEAD]) {
            asked.extend(quoted(content, "src=\"").into_iter().map(str::to_owned));
            asked.extend(quoted(content, "<link rel=\"icon\" href=\"").into_iter().map(str::to_owned));
            asked.extend(quoted(content, "<link rel=\"stylesheet\" href=\"").into_iter().map(str::to_owned));
            asked.extend(quoted(content, "from \"./").into_iter().map(|name| format!("/page/{name}")));
        }
        assert!(asked.len() > 30, "{asked:?}");
        for path in asked {
            assert!(FILES.iter().chain(&CONTROLS).any(|(served, _, _)| *served == path), "{path}");
        }
    }

    #[test]
    fn no_file_turns_text_into_markup_or_code() {
        const FORBIDDEN: [&str; 9] = [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "srcdoc",
            "style=\"",
            "onclick=",
        ];
        for (path, _, content) in FILES.into_iter().chain(CONTROLS) {
            for forbidden in FORBIDDEN {
                assert!(!content.contains(forbidden), "{path}: {forbidden}");
            }
        }
    }
}
