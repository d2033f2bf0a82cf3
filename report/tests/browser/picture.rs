//! A picture, pixel by pixel.

use std::io::Cursor;

/// A decoded PNG.
pub(crate) struct Picture {
    width: usize,
    bytes: usize,
    pixels: Vec<u8>,
}

impl Picture {
    pub(crate) fn decode(png: &[u8]) -> Self {
        let mut reader = png::Decoder::new(Cursor::new(png)).read_info().expect("a PNG");
        let mut pixels = vec![0; reader.output_buffer_size().expect("a size")];
        let info = reader.next_frame(&mut pixels).expect("a picture");
        let bytes = info.color_type.samples();
        Self { width: info.width as usize, bytes, pixels }
    }

    fn at(&self, x: usize, y: usize) -> Option<[u8; 3]> {
        let begin = (y * self.width + x) * self.bytes;
        self.pixels.get(begin..begin + 3)?.try_into().ok()
    }

    /// Whether its corner is.
    pub(crate) fn is_dark(&self) -> bool {
        self.at(1, 1).expect("a corner").iter().all(|part| *part < 96)
    }

    /// Pixels of just this colour ("rgb(1, 2, 3)") in a place: x, y, width and height.
    pub(crate) fn count(&self, place: [f64; 4], color: &str) -> usize {
        let wanted: Vec<u8> = color
            .trim_start_matches("rgb(")
            .trim_end_matches(')')
            .split(", ")
            .map(|part| part.parse().unwrap_or_else(|_| panic!("{color} is no colour")))
            .collect();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "of a picture")]
        let [x, y, width, height] = place.map(|value| value.max(0.0) as usize);
        (y..y + height)
            .flat_map(|y| (x..(x + width).min(self.width)).map(move |x| (x, y)))
            .filter(|(x, y)| self.at(*x, *y).is_some_and(|pixel| pixel[..] == wanted[..]))
            .count()
    }
}
