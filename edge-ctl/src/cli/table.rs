//! Rows to text: aligned columns, and how numbers, times and bytes look in them. Pure.

use std::cmp::Ordering;

use serde_json::Value;

/// How a value is shown.
#[derive(Clone, Copy)]
pub(super) enum Show {
    /// As it stands; lists joined by commas; absent: `-`.
    Text,
    /// A number, to the right.
    Number,
    /// Per second, one decimal, to the right.
    Rate,
    /// Bytes with a binary unit, to the right.
    Bytes,
    /// Seconds as kubectl shows them: `3m12s`.
    Age,
    /// Seconds as FRR shows them: `00:01:02`.
    Clock,
    /// `name=count` of a map, non-zero ones.
    Counts,
    /// Out of the whole row.
    Row(fn(&Value) -> String),
    /// Out of the whole row, to the right.
    RowRight(fn(&Value) -> String),
}

/// One column.
pub(super) struct Column {
    pub header: &'static str,
    /// Key in the row's object.
    pub key: &'static str,
    pub show: Show,
    /// Only with `-o wide`.
    pub wide: bool,
}

pub(super) const fn column(header: &'static str, key: &'static str, show: Show) -> Column {
    Column { header, key, show, wide: false }
}

pub(super) const fn wide(header: &'static str, key: &'static str, show: Show) -> Column {
    Column { header, key, show, wide: true }
}

impl Column {
    pub fn cell(&self, row: &Value) -> String {
        let value = row.get(self.key).unwrap_or(&Value::Null);
        match (self.show, value) {
            (Show::Row(show) | Show::RowRight(show), _) => show(row),
            (_, Value::Null) => "-".to_owned(),
            (Show::Rate, value) => value.as_f64().map_or_else(|| plain(value), |rate| format!("{rate:.1}")),
            (Show::Bytes, value) => value.as_f64().map_or_else(|| plain(value), bytes),
            (Show::Age, value) => value.as_u64().map_or_else(|| plain(value), age),
            (Show::Clock, value) => value.as_u64().map_or_else(|| plain(value), clock),
            (Show::Counts, Value::Object(counts)) => {
                let counts = counts.iter().filter(|(_, count)| count.as_u64() != Some(0));
                or_dash(counts.map(|(name, count)| format!("{name}={}", plain(count))).collect::<Vec<_>>().join(","))
            }
            (_, value) => or_dash(plain(value)),
        }
    }

    fn is_right(&self) -> bool {
        matches!(self.show, Show::Number | Show::Rate | Show::Bytes | Show::RowRight(_))
    }
}

fn or_dash(text: String) -> String {
    if text.is_empty() { "-".to_owned() } else { text }
}

/// A value as text without quotes; a list joined by commas.
pub(super) fn plain(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(plain).collect::<Vec<_>>().join(","),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        other => other.to_string(),
    }
}

/// Two units at most, as kubectl: `45s`, `3m12s`, `2h5m`, `3d4h`.
pub(super) fn age(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    let two = |big: u64, unit: &str, small: u64, small_unit: &str| match small {
        0 => format!("{big}{unit}"),
        small => format!("{big}{unit}{small}{small_unit}"),
    };
    match seconds {
        0..120 => format!("{seconds}s"),
        120..3600 => two(minutes, "m", seconds % 60, "s"),
        3600..86_400 => two(hours, "h", minutes % 60, "m"),
        _ => two(days, "d", hours % 24, "h"),
    }
}

/// As FRR's `peer_uptime`: `00:01:02`, `1d02h03m`, `01w2d03h`.
pub(super) fn clock(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match days {
        0 => format!("{hours:02}:{:02}:{:02}", minutes % 60, seconds % 60),
        1..7 => format!("{days}d{:02}h{:02}m", hours % 24, minutes % 60),
        _ => format!("{:02}w{}d{:02}h", days / 7, days % 7, hours % 24),
    }
}

/// `512`, `1.5Ki`, `20.0Mi`.
pub(super) fn bytes(value: f64) -> String {
    let mut value = value;
    for unit in ["", "Ki", "Mi", "Gi", "Ti"] {
        if value < 1024.0 || unit == "Ti" {
            return if unit.is_empty() { format!("{value:.0}") } else { format!("{value:.1}{unit}") };
        }
        value /= 1024.0;
    }
    String::new()
}

/// Rows as aligned columns, three spaces apart, without blanks at line ends. A cell that `alarms` says yes to is red.
pub(super) fn render(columns: &[&Column], rows: &[Value], headers: bool, alarms: Option<fn(&str) -> bool>) -> String {
    let mut lines: Vec<Vec<String>> = Vec::with_capacity(rows.len() + 1);
    if headers {
        lines.push(columns.iter().map(|column| column.header.to_owned()).collect());
    }
    lines.extend(rows.iter().map(|row| columns.iter().map(|column| column.cell(row)).collect()));
    let width = |index: usize| lines.iter().filter_map(|line| line.get(index)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns.len()).map(|index| width(index).unwrap_or(0)).collect();
    let mut out = String::new();
    for (number, line) in lines.iter().enumerate() {
        let is_header = headers && number == 0;
        let mut text = String::new();
        for ((cell, column), width) in line.iter().zip(columns).zip(&widths) {
            let blanks = " ".repeat(width.saturating_sub(cell.chars().count()));
            let cell = match alarms {
                Some(alarms) if !is_header && alarms(cell) => format!("\x1b[31m{cell}\x1b[0m"),
                _ => cell.clone(),
            };
            let padded = if column.is_right() { format!("{blanks}{cell}") } else { format!("{cell}{blanks}") };
            text.push_str(&padded);
            text.push_str("   ");
        }
        out.push_str(text.trim_end());
        out.push('\n');
    }
    out
}

/// Sorts by the column whose name or key is `name`, in any case; numbers as numbers, names with numbers in them naturally.
pub(super) fn sort(columns: &[Column], rows: &mut [Value], name: &str) -> Result<(), String> {
    let matches = |column: &&Column| {
        column.header.eq_ignore_ascii_case(name)
            || column.key.eq_ignore_ascii_case(&name.replace('-', "_"))
            || column.key.eq_ignore_ascii_case(name)
    };
    let Some(column) = columns.iter().find(matches) else {
        let known: Vec<_> = columns.iter().map(|column| column.header).collect();
        return Err(format!("there is no column `{name}`; the columns are {}", known.join(", ")));
    };
    rows.sort_by(|a, b| {
        let numbers = a.get(column.key).and_then(Value::as_f64).zip(b.get(column.key).and_then(Value::as_f64));
        match numbers {
            Some((a, b)) => a.total_cmp(&b),
            None => natural(&column.cell(a), &column.cell(b)),
        }
    });
    Ok(())
}

/// Compares runs of digits as numbers, so that 10.1.0.9 comes before 10.1.0.10.
fn natural(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    while let (Some(x), Some(y)) = (a.chars().next(), b.chars().next()) {
        let (left, right, order) = if x.is_ascii_digit() && y.is_ascii_digit() {
            let ((x, left), (y, right)) = (split_number(a), split_number(b));
            (left, right, x.len().cmp(&y.len()).then(x.cmp(y)))
        } else {
            (a.get(x.len_utf8()..).unwrap_or(""), b.get(y.len_utf8()..).unwrap_or(""), x.cmp(&y))
        };
        if order != Ordering::Equal {
            return order;
        }
        (a, b) = (left, right);
    }
    a.len().cmp(&b.len())
}

/// The leading digits without zeros in front, and what follows them.
fn split_number(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    (digits.trim_start_matches('0'), rest)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const COLUMNS: &[Column] = &[
        column("NAME", "name", Show::Text),
        column("ACTIVE", "active", Show::Number),
        column("RX/S", "rx/s", Show::Bytes),
        column("AGE", "age", Show::Age),
        wide("DROPS", "drops", Show::Counts),
    ];

    fn rows() -> Vec<Value> {
        vec![
            json!({"name": "web", "active": 12, "rx/s": 2048.0, "age": 200, "drops": {"too-big": 3, "no-route": 0}}),
            json!({"name": "ingress-https", "active": 3, "rx/s": 10.0, "age": null, "drops": {}}),
        ]
    }

    #[test]
    fn columns_are_aligned_and_lines_end_without_blanks() {
        let columns: Vec<&Column> = COLUMNS.iter().collect();
        let expected = "\
NAME            ACTIVE    RX/S   AGE     DROPS
web                 12   2.0Ki   3m20s   too-big=3
ingress-https        3      10   -       -
";
        assert_eq!(render(&columns, &rows(), true, None), expected);
    }

    #[test]
    fn an_alarm_colours_the_cell_and_moves_nothing() {
        let columns: Vec<&Column> = COLUMNS.iter().take(2).collect();
        let plain = render(&columns, &rows(), true, None);
        let coloured = render(&columns, &rows(), true, Some(|cell| cell == "web"));
        assert!(coloured.contains("\x1b[31mweb\x1b[0m"));
        assert_eq!(coloured.replace("\x1b[31m", "").replace("\x1b[0m", ""), plain);
    }

    #[test]
    fn sorting_knows_numbers_and_addresses() {
        let mut sorted = rows();
        sort(COLUMNS, &mut sorted, "active").unwrap();
        assert_eq!(sorted[0]["name"], "ingress-https");
        assert_eq!(natural("10.1.0.9:80", "10.1.0.10:80"), Ordering::Less);
        assert_eq!(natural("10.1.0.9", "10.1.0.9:80"), Ordering::Less);
        assert!(sort(COLUMNS, &mut sorted, "colour").unwrap_err().contains("NAME, ACTIVE"));
    }

    #[test]
    fn times_look_as_in_kubectl_and_frr() {
        assert_eq!([0, 119, 192, 7500, 360_000].map(age), ["0s", "119s", "3m12s", "2h5m", "4d4h"]);
        assert_eq!([62, 93_780, 795_600].map(clock), ["00:01:02", "1d02h03m", "01w2d05h"]);
        assert_eq!([0.0, 1023.0, 1536.0].map(bytes), ["0", "1023", "1.5Ki"]);
    }
}
