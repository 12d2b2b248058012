// Formats times for people. All times are in microseconds.

/** Returns a duration with three digits and a unit: `870 µs`, `4.21 ms`, `1.50 s`, `2 min 5 s`. */
export function duration(micros) {
  if (micros < 1) return "<1 µs";
  if (micros < 1e3) return `${Math.round(micros)} µs`;
  if (micros < 999_500) return `${digits(micros / 1e3)} ms`;
  if (micros < 59_950_000) return `${digits(micros / 1e6)} s`;
  const seconds = Math.round(micros / 1e6);
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
}

function digits(value) {
  return value.toFixed(value < 9.995 ? 2 : value < 99.95 ? 1 : 0);
}

/**
 * Returns how long ago a time was: `now`, `12 s ago`, `3 min ago`. A time in the future is `now`, because clocks
 * differ.
 */
export function age(micros, now = Date.now()) {
  const seconds = Math.floor((now - micros / 1e3) / 1e3);
  if (seconds < 1) return "now";
  if (seconds < 60) return `${seconds} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86_400) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86_400)} d ago`;
}

/** Returns the local date and time with milliseconds. */
export function clock(micros) {
  const date = new Date(micros / 1e3);
  const two = (number) => String(number).padStart(2, "0");
  const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
  const time = [date.getHours(), date.getMinutes(), date.getSeconds()].map(two).join(":");
  return `${day} ${time}.${String(date.getMilliseconds()).padStart(3, "0")}`;
}

/** Returns a number with its noun: `1 span`, `6 spans`. */
export function count(number, noun) {
  const grouped = String(number).replace(/\B(?=(\d{3})+$)/g, ",");
  return `${grouped} ${noun}${number === 1 ? "" : "s"}`;
}

/** Returns a share of a whole, in whole percent. */
export function percent(part, whole) {
  return `${whole > 0 ? Math.round((part / whole) * 100) : 0} %`;
}

/** Returns the beginning of a text, for one line, because a name can be a megabyte long. */
export function short(text, length = 200) {
  return text.length > length ? `${text.slice(0, length)}…` : text;
}
