"""Captioned videos as chats: someone asks for a video and gets it, or shows one and asks what it is."""

# A caption stands behind a colon or alone, so that "surfing" fits as well as "a person surfing".
WISHES = ("{}", "Show me a video: {}", "Make a short video of this: {}", "Please draw me a clip. It shows: {}")
QUESTIONS = ("What does this video show?", "Describe this video.", "What is happening here?")

DIALOGUES = len(WISHES) + len(QUESTIONS)
"""How many forms a chat about one video has."""


def dialogue(number: int, caption: str, video: object) -> list[dict]:
    """Form `number`, 0 to DIALOGUES - 1, of a chat about a video: messages as in `larp_mllm.conversation.chat_segments`."""
    shown = [{"type": "video", "video": video}]
    if number < len(WISHES):
        return [
            {"role": "user", "content": WISHES[number].format(caption)},
            {"role": "assistant", "content": shown},
        ]
    question = {"type": "text", "text": QUESTIONS[number - len(WISHES)]}
    return [{"role": "user", "content": [*shown, question]}, {"role": "assistant", "content": caption}]


def drawn_dialogue(uniform: float) -> int:
    """The form that a number in [0, 1) stands for: wishes and questions are equally frequent."""
    wishes, questions = len(WISHES), len(QUESTIONS)
    if uniform < 0.5:
        return int(2 * uniform * wishes)
    return wishes + int((2 * uniform - 1) * questions)
