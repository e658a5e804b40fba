"""Vocabulary: the id layout text | video_start | video_end | codes, as arithmetic on ids."""

from dataclasses import dataclass

IGNORE = -100


@dataclass(frozen=True)
class Vocabulary:
    """The id layout of one model. Its methods take integers and integer tensors.

    `text_size` is the first id that is not text. `Vocabulary.for_base` computes it once, and the model's config records
    it: with a padded vocabulary (Qwen2: 151,936 rows, about 151,646 used) neither size alone determines it. Raises
    ValueError for sizes below 1.
    """

    text_size: int
    codebook_size: int
    tokens_per_video: int

    def __post_init__(self):
        for name in ("text_size", "codebook_size", "tokens_per_video"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @classmethod
    def for_base(
        cls, vocab_size: int, tokenizer_length: int, codebook_size: int, tokens_per_video: int
    ) -> "Vocabulary":
        """The layout for a base with `vocab_size` embedding rows and a text tokenizer of `tokenizer_length` entries."""
        return cls(max(vocab_size, tokenizer_length), codebook_size, tokens_per_video)

    @property
    def video_start(self) -> int:
        """The id that begins a video span."""
        return self.text_size

    @property
    def video_end(self) -> int:
        """The id that ends a video span, after exactly `tokens_per_video` codes."""
        return self.text_size + 1

    @property
    def first_code(self) -> int:
        """The id of code 0."""
        return self.text_size + 2

    @property
    def size(self) -> int:
        """The number of ids; the largest is `size - 1`."""
        return self.first_code + self.codebook_size

    def is_text(self, ids):
        """True where an id is a text id (elementwise for tensors)."""
        return ids < self.text_size

    def is_code(self, ids):
        """True where an id is a code (elementwise for tensors)."""
        return ids >= self.first_code

    def is_inside(self, ids):
        """True where a span goes on after an id: video_start and codes (elementwise for tensors)."""
        return (ids >= self.text_size) & (ids != self.video_end)

    def code_to_id(self, codes):
        """Codes in [0, K) -> ids."""
        return codes + self.first_code

    def id_to_code(self, ids):
        """Code ids -> codes in [0, K)."""
        return ids - self.first_code

    def span(self, codes) -> list[int]:
        """The ids of one video: video_start, N codes, video_end. Raises ValueError for another number or range of codes."""
        codes = list(map(int, codes))
        if len(codes) != self.tokens_per_video:
            raise ValueError(
                f"a video of this model has {self.tokens_per_video} codes, got {len(codes)}; "
                "encode it with the video tokenizer that the model was trained with"
            )
        if min(codes) < 0 or max(codes) >= self.codebook_size:
            raise ValueError(
                f"codes must lie in [0, {self.codebook_size}), got {min(codes)} to {max(codes)}; "
                "encode the video with the tokenizer that the model was trained with"
            )
        # Not through code_to_id: training builds hundreds of spans per second.
        first = self.first_code
        return [self.video_start, *[code + first for code in codes], self.video_end]

    def split(self, ids) -> list[tuple[str, list[int]]]:
        """Ids -> segments ("text", text ids) and ("video", codes) in order, without the controls.

        Raises ValueError for a span that does not hold exactly N codes, and for codes and controls outside a span.
        """
        segments: list[tuple[str, list[int]]] = []
        ids, position = [int(i) for i in ids], 0
        while position < len(ids):
            if ids[position] == self.video_start:
                end = position + 1 + self.tokens_per_video
                codes = ids[position + 1 : end]
                if len(codes) < self.tokens_per_video or not all(self.is_code(i) for i in codes):
                    raise ValueError(
                        f"the video span at position {position} does not hold {self.tokens_per_video} codes"
                    )
                if end < len(ids) and ids[end] != self.video_end:
                    raise ValueError(f"the video span at position {position} does not end with video_end")
                segments.append(("video", [self.id_to_code(i) for i in codes]))
                position = end + 1
            elif self.is_text(ids[position]):
                if not segments or segments[-1][0] != "text":
                    segments.append(("text", []))
                segments[-1][1].append(ids[position])
                position += 1
            else:
                raise ValueError(f"id {ids[position]} at position {position} is outside a video span")
        return segments
