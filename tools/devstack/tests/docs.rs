//! Checks that the files, tests and variables that the documents name exist.

use anyhow::{Context, Result};
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

const DOCUMENTS: [&str; 12] = [
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/adding.md",
    "docs/benchmarks.md",
    "docs/bounds.md",
    "docs/chaos.md",
    "docs/configuration.md",
    "docs/conventions.md",
    "docs/copying.md",
    "docs/layers.md",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn documents() -> Result<Vec<(PathBuf, String)>> {
    let mut paths: Vec<_> = DOCUMENTS.iter().map(|name| root().join(name)).collect();
    for entry in fs::read_dir(root().join("docs/decisions"))? {
        paths.push(entry?.path());
    }
    for entry in fs::read_dir(root().join("tools"))? {
        paths.extend(Some(entry?.path().join("README.md")).filter(|page| page.exists()));
    }
    paths.into_iter().map(|path| Ok((path.clone(), fs::read_to_string(path)?))).collect()
}

/// Returns the parts of `text` between `open` and the next `close`.
fn between<'a>(text: &'a str, open: &'a str, close: char) -> impl Iterator<Item = &'a str> {
    text.split(open).skip(1).filter_map(move |rest| rest.split_once(close).map(|(part, _)| part))
}

#[test]
fn links_lead_to_files() -> Result<()> {
    let mut links = 0;
    for (path, text) in documents()? {
        for link in between(&text, "](", ')').filter(|link| !link.contains("://")) {
            let file = link.split('#').next().unwrap_or_default();
            let target = path.parent().context("a folder")?.join(file);
            assert!(file.is_empty() || target.exists(), "{}: {link}", path.display());
            links += 1;
        }
    }
    assert!(links > 10, "{links}");
    Ok(())
}

#[test]
fn files_in_backticks_exist() -> Result<()> {
    for (path, text) in documents()? {
        let is_file = |code: &&str| {
            let code = code.trim_end_matches('/');
            !code.contains([' ', '{', '*', '…'])
                && (code.ends_with(".rs")
                    || code.ends_with(".md")
                    || code.ends_with(".proto")
                    || code.ends_with(".json"))
                && code.contains('/')
        };
        for file in text.lines().flat_map(in_backticks).filter(is_file) {
            let beside = path.parent().context("a folder")?.join(file);
            assert!(root().join(file).exists() || beside.exists(), "{}: {file}", path.display());
        }
    }
    Ok(())
}

#[test]
fn every_variable_has_its_row_and_every_row_its_test() -> Result<()> {
    let text = fs::read_to_string(root().join("docs/configuration.md"))?;
    let services = ["api/src/config.rs", "rpc/src/config.rs", "mq/src/config.rs"];
    let shared = [
        "crates/telemetry/src/config/mod.rs",
        "crates/serving/src/shutdown.rs",
        "crates/amqp/src/arguments.rs",
    ];
    for file in shared.into_iter().chain(services) {
        let source = fs::read_to_string(root().join(file))?;
        // The unit tests are left out, because the search would also find the strings in these tests.
        let source = source.split("#[cfg(test)]").next().unwrap_or_default();
        for variable in between(source, "\"", '"').filter(|name| is_variable(name)) {
            let specific = variable.replace("OTEL_EXPORTER_OTLP_TRACES", "…_TRACES");
            let found = text.contains(&format!("`{variable}`")) || text.contains(&format!("`{specific}`"));
            assert!(found, "{variable} of {file} is not in docs/configuration.md");
        }
    }

    let mut tests = 0;
    let text = text + &fs::read_to_string(root().join("docs/bounds.md"))?;
    for (file, test) in text.split('`').skip(1).step_by(2).filter_map(|code| code.split_once("::")) {
        let source = match file {
            "telemetry" => root().join("crates/telemetry/src/config/tests.rs"),
            "bounds" => root().join("api/tests/bounds.rs"),
            "connections" | "dead_parts" => root().join(format!("tools/devstack/tests/{file}.rs")),
            file => root().join(format!("tools/devstack/tests/e2e/{file}.rs")),
        };
        let source = fs::read_to_string(&source).with_context(|| source.display().to_string())?;
        assert!(source.contains(&format!("fn {test}()")), "there is no {file}::{test}");
        tests += 1;
    }
    assert!(tests > 20, "{tests}");
    Ok(())
}

#[test]
fn code_of_the_page_on_layers_is_that_of_its_tests() -> Result<()> {
    let page = fs::read_to_string(root().join("docs/layers.md"))?;
    let source = fs::read_to_string(root().join("tools/devstack/tests/e2e/layers.rs"))?;
    // The comparison ignores indentation, because some blocks are indented in the source file.
    let source: Vec<_> = source.lines().map(str::trim).collect();
    let blocks: Vec<_> =
        page.split("```rust\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    for block in &blocks {
        let block: Vec<_> = block.lines().map(str::trim).collect();
        assert!(source.windows(block.len()).any(|lines| lines == block), "{block:#?}");
    }
    assert!(blocks.len() > 3, "{}", blocks.len());
    Ok(())
}

/// A file of end-to-end tests that `main.rs` does not name would never run.
#[test]
fn every_file_of_end_to_end_tests_is_in_the_program() -> Result<()> {
    let folder = root().join("tools/devstack/tests/e2e");
    let program = fs::read_to_string(folder.join("main.rs"))?;
    for entry in fs::read_dir(&folder)? {
        let path = entry?.path();
        let name = path.file_stem().context("a name")?.display().to_string();
        let is_test = path.extension().is_some_and(|extension| extension == "rs") && name != "main";
        assert!(!is_test || program.contains(&format!("\nmod {name};\n")), "{name}");
    }
    Ok(())
}

/// A row of the reading list is `| number | [path](path) | lines | sentence |`.
#[test]
fn the_reading_list_is_what_it_says() -> Result<()> {
    let readme = fs::read_to_string(root().join("README.md"))?;
    let (mut files, mut total) = (0, 0);
    for row in readme.lines() {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let ["", number, link, told, sentence, ""] = cells.as_slice() else { continue };
        // The head of the table has no number.
        let Ok(number) = number.parse::<usize>() else { continue };
        files += 1;
        assert_eq!(number, files, "{row}");
        assert!(sentence.ends_with('.'), "{row}");

        let link = link.strip_prefix('[').and_then(|link| link.strip_suffix(')'));
        let (name, path) = link.and_then(|link| link.split_once("](")).with_context(|| row.to_owned())?;
        assert_eq!(name, path, "{row}");
        let text = fs::read_to_string(root().join(path)).with_context(|| path.to_owned())?;
        let told: usize = told.parse().with_context(|| row.to_owned())?;
        assert_eq!(told, text.lines().count(), "README.md states a wrong number of lines for {path}");
        total += told;
    }
    assert!((5..=12).contains(&files), "the list has {files} files");
    assert!(total <= 1700, "the list has {total} lines");

    let (lines, words) = (readme.lines().count(), readme.split_whitespace().count());
    assert!(lines <= 120 && words <= 900, "README.md has {lines} lines and {words} words");
    Ok(())
}

#[test]
fn a_mobile_number_passes_few_files_between_the_body_and_the_history() -> Result<()> {
    let mut files = Vec::new();
    for folder in ["api/src", "mq/src", "proto/src"] {
        collect_files(&root().join(folder), &mut files)?;
    }
    files.retain(|path| !path.ends_with("tests.rs") && !path.ends_with("generated/usercenter.v1.rs"));
    let mut passed = Vec::new();
    for path in files.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "rs")) {
        let text = fs::read_to_string(&path)?;
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        if ["MobileNumber", ".mobile", "(mobile)"].iter().any(|use_of_it| code.contains(use_of_it)) {
            passed.push(path);
        }
    }
    assert!((5..=8).contains(&passed.len()), "{passed:#?}");
    Ok(())
}

/// A row of the map is `| purpose | code and links |`.
#[test]
fn the_map_quotes_the_files_that_it_links() -> Result<()> {
    let readme = fs::read_to_string(root().join("README.md"))?;
    let (_, map) = readme.split_once("## How do I trace …").context("no map")?;
    let (map, _) = map.split_once("\n## ").context("nothing after the map")?;
    let mut quotes = 0;
    for row in map.lines() {
        let linked = between(row, "](", ')').map(|link| fs::read_to_string(root().join(link)));
        let linked = linked.collect::<Result<String, _>>().with_context(|| row.to_owned())?;
        for quote in in_backticks(row).flat_map(|code| code.split('…')) {
            assert!(linked.contains(quote), "{quote} is in none of the files that this row links: {row}");
            quotes += 1;
        }
    }
    assert!(quotes > 5, "{quotes}");
    Ok(())
}

/// A row of the table is `| [folder](link) | lines, about | folders | sentence |`.
#[test]
fn the_page_on_copying_knows_the_size_and_the_needs_of_each_crate() -> Result<()> {
    let page = fs::read_to_string(root().join("docs/copying.md"))?;
    let mut crates = BTreeSet::new();
    for row in page.lines().filter(|row| row.starts_with("| [`crates/")) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let ["", folder, told, needs, _, ""] = cells.as_slice() else { panic!("{row}") };
        let folder = in_backticks(folder).next().context("no folder")?;

        let told: usize = told.replace(',', "").parse()?;
        let lines = lines(&root().join(folder).join("src"))?;
        assert!(told.abs_diff(lines) * 10 <= lines, "{folder} has {lines} lines, not about {told}");

        let manifest = fs::read_to_string(root().join(folder).join("Cargo.toml"))?;
        let (_, dependencies) = manifest.split_once("\n[dependencies]\n").context("no dependencies")?;
        let dependencies = dependencies.split("\n[").next().unwrap_or_default();
        let names = dependencies.lines().filter_map(|line| line.split(['.', ' ']).next());
        let ours = names.map(|name| format!("crates/{name}")).filter(|path| root().join(path).exists());
        assert_eq!(in_backticks(needs).map(str::to_owned).collect::<BTreeSet<_>>(), ours.collect(), "{row}");
        crates.insert(folder.to_owned());
    }
    let all = fs::read_dir(root().join("crates"))?.map(|entry| Ok(entry?.file_name()));
    let all = all.collect::<Result<Vec<_>>>()?;
    assert_eq!(crates, all.iter().map(|name| format!("crates/{}", name.display())).collect());
    Ok(())
}

/// `.ci/run` applies the diffs and compiles the result. This test shows sooner which file no longer fits the
/// page.
#[test]
fn the_page_on_adding_names_the_files_that_it_changes_and_its_diffs_fit() -> Result<()> {
    let page = fs::read_to_string(root().join("docs/adding.md"))?;
    let mut sections = page.split("\n## ");
    let table = sections.next().unwrap_or_default();
    let mut hunks = 0;
    for section in sections {
        let title = section.lines().next().unwrap_or_default();
        let link = format!("](#{})", title.to_lowercase().replace(' ', "-"));
        let row = table.lines().find(|row| row.contains(&link)).with_context(|| link.clone())?;
        let changed = section.lines().filter_map(|line| line.strip_prefix("+++ b/"));
        assert_eq!(in_backticks(row).collect::<BTreeSet<_>>(), changed.collect(), "{title}");

        for file in section.split("\n--- a/").skip(1) {
            let (path, diff) = file.split_once('\n').context("a diff")?;
            let source = format!("\n{}", fs::read_to_string(root().join(path))?);
            for hunk in diff.split("\n```").next().unwrap_or_default().split("\n@@ ").skip(1) {
                let old = hunk.lines().skip(1).filter(|line| !line.starts_with('+'));
                let old = old.map(|line| format!("\n{}", line.get(1..).unwrap_or_default()));
                let old: String = old.collect();
                // The old lines must occur only once, because otherwise a diff could be applied at the wrong
                // place.
                assert_eq!(
                    source.matches(&format!("{old}\n")).count(),
                    1,
                    "these lines must occur exactly once in {path}:{old}"
                );
                hunks += 1;
            }
        }
    }
    assert!(hunks > 20, "{hunks}");
    Ok(())
}

fn in_backticks(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// The first layer of the Docker images builds only the dependencies, from manifests without their sources.
/// cargo refuses a manifest that names a target whose file is missing.
#[test]
fn the_dockerfile_has_every_manifest_and_a_file_for_each_target_that_one_names() -> Result<()> {
    let dockerfile = fs::read_to_string(root().join("deploy/Dockerfile"))?;
    for folder in ["crates", "tools"] {
        for entry in fs::read_dir(root().join(folder))? {
            let path = entry?.path();
            let Ok(manifest) = fs::read_to_string(path.join("Cargo.toml")) else { continue };
            let name = format!("{folder}/{}", path.file_name().context("a name")?.display());
            assert!(dockerfile.contains(&format!("COPY {name}/Cargo.toml {name}/\n")), "{name}");
            for kind in ["test", "example"] {
                for target in between(&manifest, &format!("[[{kind}]]\nname = \""), '"') {
                    assert!(dockerfile.contains(&format!("{kind}s/{target}.rs")), "{name}: {kind} {target}");
                }
            }
        }
    }
    Ok(())
}

/// Counts the lines of all files in a folder.
fn lines(folder: &Path) -> Result<usize> {
    let mut files = Vec::new();
    collect_files(folder, &mut files)?;
    let texts = files.iter().map(fs::read_to_string).collect::<Result<Vec<_>, _>>()?;
    Ok(texts.iter().map(|text| text.lines().count()).sum())
}

fn collect_files(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() { collect_files(&path, files)? } else { files.push(path) }
    }
    Ok(())
}

fn is_variable(name: &str) -> bool {
    name.len() > 4
        && name.contains('_')
        && !name.ends_with('_')
        && name.bytes().all(|b| b.is_ascii_uppercase() || b == b'_')
        && !["CLIENT_KEY", "CLIENT_CERTIFICATE"].contains(&name)
}
