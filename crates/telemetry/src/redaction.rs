//! Removes phone numbers and similar numbers from callers' text, before the text becomes a span attribute.

use percent_encoding::percent_decode_str;

/// Removes anything that might be the number of a phone, a card or an account. If the text is percent-encoded
/// and a number is removed, the text is returned decoded.
pub(crate) fn without_long_numbers(text: &str) -> String {
    decoded_if_redacted(text, |text| redacted(text, |_| false))
}

/// Removes the same numbers from a `User-Agent`, but keeps versions, builds and models, because every Firefox
/// sends `Gecko/20100101`. A number is kept in two cases:
///
/// - It has at most 8 digits without a dash or a space, and is attached to a letter (`2201116SG`) or is in a
///   product's version (`Build/eng.root.20190412`).
/// - It is a later part of a version, and has groups of at most 3 digits (`Build/S3SGS32.39-181-11-14-1-3`).
///
/// So a mobile number of 7 or 8 digits would be kept if somebody wrote it as a version. A number that has 9
/// digits or more in a row, or that stands by itself, is never kept.
pub(crate) fn user_agent(text: &str) -> String {
    decoded_if_redacted(text, |text| redacted(text, is_version))
}

fn decoded_if_redacted(text: &str, redacted: impl Fn(&str) -> String) -> String {
    if !text.contains('%') {
        return redacted(text);
    }
    let decoded = percent_decode_str(text).decode_utf8_lossy();
    let redacted = redacted(&decoded);
    if redacted == decoded { text.to_owned() } else { redacted }
}

/// A long number, and the text around it.
struct Number<'a> {
    before: &'a str,
    /// Digits, with a dash or a space between some of them.
    number: &'a str,
    after: &'a str,
    /// The number of digits in the longest row of digits.
    longest_row: usize,
}

fn is_version(Number { before, number, after, longest_row }: Number) -> bool {
    let token = before.rsplit([' ', '\t', ';', ',', '(', ')']).next().unwrap_or_default();
    let is_of_product = token.contains('/') && token.starts_with(|first: char| first.is_ascii_alphabetic());
    let is_letter = |c: char| c.is_ascii_alphabetic();
    if number.len() == longest_row {
        let is_attached = is_of_product || before.ends_with(is_letter) || after.starts_with(is_letter);
        is_attached && longest_row <= 8
    } else {
        let is_later_part = is_of_product && before.ends_with('.');
        is_later_part && longest_row <= 3 && !number.contains(' ')
    }
}

fn redacted(text: &str, is_kept: impl Fn(Number) -> bool) -> String {
    /// The fewest digits in a row that count as a long number.
    const SHORTEST: usize = 7;
    /// The fewest digits that count as a long number if a dash or a space is between some of them. A date
    /// with an hour has one digit fewer.
    const SHORTEST_IN_GROUPS: usize = 11;

    let mut kept = String::with_capacity(text.len());
    let mut done = 0;
    while let Some(length) = text[done..].find(|c: char| c.is_ascii_digit()) {
        let (before, rest) = text.split_at(done + length);
        kept.push_str(&before[done..]);
        let bytes = rest.as_bytes();
        let (mut end, mut digits, mut row, mut longest_row) = (0, 0, 0, 0);
        loop {
            match bytes.get(end) {
                Some(b'0'..=b'9') => (digits, row) = (digits + 1, row + 1),
                Some(b'-' | b' ') if bytes.get(end + 1).is_some_and(u8::is_ascii_digit) => row = 0,
                _ => break,
            }
            longest_row = longest_row.max(row);
            end += 1;
        }
        let (number, after) = rest.split_at(end);
        let is_long = longest_row >= SHORTEST || digits >= SHORTEST_IN_GROUPS;
        let is_redacted = is_long && !is_kept(Number { before, number, after, longest_row });
        kept.push_str(if is_redacted { "REDACTED" } else { number });
        done = text.len() - after.len();
    }
    kept.push_str(&text[done..]);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn long_numbers_are_redacted() {
        for (text, kept) in [
            ("", ""),
            ("/users/13800138000/x", "/users/REDACTED/x"),
            ("/v1/123456/1234567", "/v1/123456/REDACTED"),
            ("Chrome/126.0.6478.127 é 12345678é", "Chrome/126.0.6478.127 é REDACTEDé"),
            ("/x/138-0013-8000", "/x/REDACTED"),
            ("+86 138 0013 8000, 7", "+REDACTED, 7"),
            ("/2026-11-25/17-1", "/2026-11-25/17-1"),
            ("/x/%31%33%38%30013%38000?", "/x/REDACTED?"),
            ("/x/138%200013%208000", "/x/REDACTED"),
            ("/a%20b%ff/1", "/a%20b%ff/1"),
            ("1-", "1-"),
        ] {
            assert_eq!(without_long_numbers(text), kept);
        }
    }

    const AGENTS: [&str; 22] = [
        "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
        "Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:145.0) Gecko/20100101 Firefox/145.0",
        "Mozilla/5.0 (Macintosh; Intel Mac OS X 10.15; rv:139.0) Gecko/20100101 Firefox/139.0",
        "Mozilla/5.0 (Android 15; Mobile; rv:140.0) Gecko/140.0 Firefox/140.0",
        "Mozilla/5.0 (X11; U; Linux i686; en-US; rv:1.9.2.3) Gecko/20100423 Ubuntu/10.04 (lucid) Firefox/3.6.3",
        "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Thunderbird/128.5.0",
        "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0.6478.127 Safari/537.36 Edg/126.0.2592.87",
        "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5_1 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.5 Mobile/15E148 Safari/604.1",
        "Mozilla/5.0 (Linux; Android 10; K) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0.6778.200 Mobile Safari/537.36",
        "Mozilla/5.0 (Linux; Android 13; Pixel 7 Build/TQ3A.230901.001.C2; wv) AppleWebKit/537.36 (KHTML, like Gecko) Version/4.0 Chrome/131.0.6778.135 Mobile Safari/537.36",
        "Mozilla/5.0 (Linux; Android 12; 2201116SG Build/SKQ1.211006.001) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0.6099.144 Mobile Safari/537.36",
        "Mozilla/5.0 (Linux; U; Android 13; zh-cn; 22101316UG Build/TP1A.220624.014) AppleWebKit/537.36 (KHTML, like Gecko) Version/4.0 Chrome/109.0.5414.118 Mobile Safari/537.36 XiaoMi/MiuiBrowser/18.6.40728",
        "Mozilla/5.0 (Linux; Android 12; moto g(50) Build/S3SGS32.39-181-11-14-1-3) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/125.0.6422.165 Mobile Safari/537.36",
        "Mozilla/5.0 (Linux; Android 9; Redmi Note 8 Build/PKQ1.190616.001; wv) AppleWebKit/537.36 (KHTML, like Gecko) Version/4.0 Chrome/116.0.0.0 Mobile Safari/537.36 XWEB/1160117 MMWEBSDK/20231202 MicroMessenger/8.0.47.2560(0x28002F35) NetType/WIFI Language/zh_CN",
        "Mozilla/5.0 (Windows NT 10.0; WOW64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/81.0.4044.138 Safari/537.36 NetType/WIFI MicroMessenger/7.0.20.1781(0x6700143B)",
        "Dalvik/2.1.0 (Linux; U; Android 9; SM-T515 Build/PPR1.180610.011)",
        "Dalvik/2.1.0 (Linux; U; Android 10; Box Build/eng.root.20190412.140522)",
        "Dalvik/2.1.0 (Linux; U; Android 7.1.2; TX3 Build/20190302)",
        "Opera/9.80 (Android; Opera Mini/36.2.2254/119.132; U; id) Presto/2.12.423 Version/12.16",
        "okhttp/4.12.0",
        "curl/8.5.0",
        "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)",
    ];

    #[test]
    fn user_agents_stay_whole() {
        for agent in AGENTS {
            assert_eq!(user_agent(agent), agent);
        }
    }

    #[test]
    fn phone_numbers_in_user_agents_are_redacted() {
        for (agent, kept) in [
            ("1380013", "REDACTED"),
            ("13800138000", "REDACTED"),
            ("app 20100101", "app REDACTED"),
            ("app/1.0 (13800138)", "app/1.0 (REDACTED)"),
            ("app/13800138000", "app/REDACTED"),
            ("app/1.0.138001380", "app/1.0.REDACTED"),
            ("app13800138000x", "appREDACTEDx"),
            ("/20100101", "/REDACTED"),
            ("app/138-0013-8000", "app/REDACTED"),
            ("app/1.138-0013-8000", "app/1.REDACTED"),
            ("app/06-12-34-56-78-9", "app/REDACTED"),
            ("Gecko/20100101 138 0013 8000", "Gecko/REDACTED"),
            ("app/1.0 +86 138 0013 8000", "app/1.0 +REDACTED"),
            ("app%2F%31%33%38%30013%38000", "app/REDACTED"),
        ] {
            assert_eq!(user_agent(agent), kept, "{agent}");
        }
    }

    proptest! {
        // Digits after a `%` may be part of an encoded character.
        #[test]
        fn no_number_of_nine_digits_or_more_stays(before in "[^%]{0,12}", number in "[0-9]{9,15}", after in ".{0,12}") {
            let text = format!("{before}{number}{after}");
            prop_assert!(!user_agent(&text).contains(&number), "{text:?}");
            prop_assert!(!without_long_numbers(&text).contains(&number), "{text:?}");
        }

        #[test]
        fn no_number_that_stands_by_itself_stays(agent in 0..AGENTS.len(), number in "[0-9]{7,15}") {
            for text in [format!("{} {number}", AGENTS[agent]), format!("{number} {}", AGENTS[agent]), format!("({number})")] {
                prop_assert!(!user_agent(&text).contains(&number), "{text:?}");
            }
        }
    }
}
