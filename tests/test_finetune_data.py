"""Data of the fine-tune: rows of a file, their tokens, and the order in which they are learned."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

import finetune.rows
from finetune.batches import Batches, fixed, local_rows, place
from finetune.encoding import Encoded, Encoder, encode_rows
from finetune.packing import first_fit, plan, widths
from finetune.rows import DataError, Message, Row, hold_out, read_rows
from pretrained import Chat

BOS, EOS = "<|im_start|>", "<|im_end|>"
BOS_ID, EOS_ID = 256, 257
CHATML = Chat(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LENGTHS = st.lists(st.integers(2, 30), min_size=1, max_size=40)


def byte_tokenizer(merges=()):
    """One token a byte, but for merges, and two special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate([*letters, BOS, EOS])}
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([BOS, EOS])
    return made


def encoder(length=100, *, chat=None, bos=None, eos=(EOS_ID,), merges=()):
    return Encoder(byte_tokenizer(merges), chat, eos, bos, length)


def texts(encoded):
    """All tokens and the learned ones, as text."""
    ids = encoded.tokens, encoded.tokens[encoded.answer]
    return tuple(byte_tokenizer().decode(each.tolist(), skip_special_tokens=False) for each in ids)


def write(folder, *lines):
    path = folder / "data.jsonl"
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(encoded))
    return path


def rows_of(lengths):
    """Rows of distinct tokens, of which the last third is learned."""
    starts = np.cumsum([0, *lengths])
    return tuple(
        Encoded(np.arange(start, start + n, dtype=np.int32) + 1, np.arange(n) >= n - 1 - n // 3)
        if n > 2
        else Encoded(np.arange(start, start + n, dtype=np.int32) + 1, np.arange(n) == 1)
        for start, n in zip(starts, lengths, strict=False)
    )


# -- rows --


def test_all_three_forms_are_read_and_told_apart_line_by_line(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = write(
        tmp_path,
        {"context": "1 + 1? Answer:", "target": "2"},
        b"",
        {"prompt": "one\n", "completion": "two"},
        {"messages": chat},
    )
    first, second, third = read_rows(path).rows
    assert (first.prompt, first.answer) == ("1 + 1? Answer:", " 2")
    assert (second.prompt, second.answer) == ("one\n", "two")
    assert [message._asdict() for message in third.messages] == chat
    assert [row.where for row in (first, third)] == [f"{path}, line 1", f"{path}, line 4"]


@pytest.mark.parametrize(("context", "target"), [("a\n", "b"), ("a ", "b"), ("a", " b"), ("", "b")])
def test_context_and_target_are_joined_as_they_are_where_white_space_parts_them(
    tmp_path, context, target
):
    row = read_rows(write(tmp_path, {"context": context, "target": target})).rows[0]
    assert row.prompt + row.answer == context + target


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\r\n\r\n')
    assert read_rows(path).rows[0].answer == "b"


ASSISTANT = {"role": "assistant", "content": "yes"}
BAD_LINES = {
    "not JSON": (b"{oops}", "not JSON .*column 2"),
    "not UTF-8": (b'{"prompt": "\xe9", "completion": "b"}', "not UTF-8 .byte 13 is 0xe9."),
    "a list": ([1], "expected a JSON object, found a list"),
    "a huge number": (b"9" * 5000, "not a row of text"),
    "a missing key": ({"prompt": "a"}, "completion is missing"),
    "an extra key": ({"prompt": "a", "completion": "b", "id": 1}, "unknown key id"),
    "two forms": ({"prompt": "a", "completion": "b", "target": "c"}, "unknown key target"),
    "other keys": ({"text": "a"}, r"expected the keys .*found \['text'\]"),
    "a number": ({"context": "a", "target": 5}, "target must be a string, found a number"),
    "null": ({"prompt": None, "completion": "b"}, "prompt must be a string, found null"),
    "no answer": ({"prompt": "a", "completion": " \n"}, "completion is empty"),
    "half a letter": ({"prompt": "\ud800", "completion": "b"}, "prompt holds half of a surrogate"),
    "no messages": ({"messages": []}, "a list of messages, found an empty list"),
    "a text message": ({"messages": ["a"]}, r"messages\[0\] must be .*found a string"),
    "a named message": ({"messages": [{**ASSISTANT, "name": "x"}]}, r"must be .*'name'"),
    "another role": ({"messages": [{"role": "bot", "content": "a"}]}, "one of system.*found 'bot'"),
    "a list as role": ({"messages": [{"role": [], "content": "a"}]}, "one of system"),
    "no last answer": (
        {"messages": [ASSISTANT, {"role": "user", "content": "a"}]},
        "last message must be from the assistant.*from the user",
    ),
    "an answer to nothing": ({"messages": [ASSISTANT]}, "it answers nothing"),
    "an empty turn": ({"messages": [{**ASSISTANT, "content": ""}]}, r"\[0\].content is empty"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named_with_its_fault_or_skipped_and_counted(tmp_path, line, message):
    good = {"prompt": "a", "completion": "b"}
    path = write(tmp_path, good, line, good)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}, line 2: .*{message}"):
        read_rows(path)
    found = read_rows(path, skip_bad=True)
    assert len(found.rows) == 2
    assert len(found.skipped) == 1
    assert re.search(message, found.skipped[0])


def test_a_file_that_is_missing_empty_a_folder_or_a_pointer_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.jsonl does not exist \(looked from "):
        read_rows("nowhere.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match=r"data.jsonl holds no row to learn from: it is empty"):
        read_rows(write(tmp_path, b" "))
    with pytest.raises(DataError, match=r"all 2 lines are bad: .*line 1: not JSON"):
        read_rows(write(tmp_path, b"x", b"y"), skip_bad=True)
    with pytest.raises(DataError, match="git lfs pull"):
        read_rows(write(tmp_path, b"version https://git-lfs.github.com/spec/v1"))


def test_rows_are_held_out_at_random_always_the_same_ones_and_at_least_one():
    rows = tuple(Row(str(place)) for place in range(100))
    train, held = hold_out(rows, 0.1, seed=1)
    assert len(held) == 10
    assert sorted(train + held) == sorted(rows)
    assert (train, held) == hold_out(rows, 0.1, seed=1)
    assert held != hold_out(rows, 0.1, seed=2)[1]
    assert [len(part) for part in hold_out(rows[:3], 0.01, seed=0)] == [2, 1]
    with pytest.raises(DataError, match="name an eval_dataset"):
        hold_out(rows[:1], 0.5, seed=0)


# -- encoding --


def test_the_answer_and_one_end_are_learned_and_the_prompt_is_not():
    found = encoder().encode(Row("", "one ", "two"))
    assert texts(found) == (f"one two{EOS}", f"two{EOS}")
    assert texts(encoder().encode(Row("", "one ", f"two{EOS}"))) == texts(found)


def test_a_beginning_is_added_once_where_the_tokenizer_has_one():
    assert texts(encoder(bos=BOS_ID).encode(Row("", "a", "b")))[0] == f"{BOS}ab{EOS}"
    assert texts(encoder(bos=BOS_ID).encode(Row("", f"{BOS}a", "b")))[0] == f"{BOS}ab{EOS}"


def test_an_empty_prompt_leaves_the_first_token_unlearned_unless_something_comes_before_it():
    assert texts(encoder().encode(Row("", "", "abc"))) == (f"abc{EOS}", f"bc{EOS}")
    assert texts(encoder(bos=BOS_ID).encode(Row("", "", "abc")))[1] == f"abc{EOS}"


def test_a_merge_across_the_boundary_does_not_change_the_tokens_of_the_prompt():
    plain = encoder(merges=[("a", "b")])
    apart, within = plain.encode(Row("", "xa", "by")), plain.encode(Row("", "x", "aby"))
    prompt = byte_tokenizer([("a", "b")]).encode("xa").ids
    assert apart.prompt.tolist() == prompt
    assert len(apart.tokens) == len(within.tokens) + 1


def test_a_tokenizer_that_begins_every_text_with_a_space_puts_none_before_the_answer():
    spaced = byte_tokenizer()
    spaced.normalizer = normalizers.Prepend(" ")
    found = Encoder(spaced, None, (EOS_ID,), None, 100).encode(Row("", "one ", "two"))
    assert texts(found) == (f" one two{EOS}", f"two{EOS}")


def test_nor_where_the_space_at_the_end_of_the_prompt_would_merge_with_the_answer():
    spaced = byte_tokenizer(merges=[("Ġ", "t")])
    spaced.normalizer = normalizers.Prepend(" ")
    found = Encoder(spaced, None, (EOS_ID,), None, 100).encode(Row("", "one ", "two"))
    assert spaced.decode(found.tokens.tolist()) == " one two"
    assert found.answer.sum() == len("two") + 1


@pytest.mark.parametrize(
    ("merges", "own", "prompt", "answer"),
    [
        ([("Ċ", "Ċ")], (), "hi\n", "\nanswer"),  # it would merge with a line's end, too
        ([("Ġ", "a")], ("\n",), "hi ", "answer"),  # after which a space is put in front
    ],
)
def test_an_answer_is_put_after_something_that_it_does_not_merge_with(merges, own, prompt, answer):
    spaced = byte_tokenizer(merges)
    spaced.normalizer = normalizers.Prepend(" ")
    spaced.add_tokens([AddedToken(text, normalized=False) for text in own])
    found = Encoder(spaced, None, (EOS_ID,), None, 100).encode(Row("", prompt, answer))
    assert spaced.decode(found.tokens.tolist()) == f" {prompt}{answer}"
    assert spaced.decode(found.tokens[found.answer].tolist()) == answer


def test_all_answers_of_a_chat_are_learned_each_up_to_its_end():
    turns = [("system", "s"), ("user", "u"), ("assistant", "one"), ("user", "v")]
    row = Row("", messages=_chat(*turns, ("assistant", "two")))
    whole, learned = texts(encoder(200, chat=CHATML).encode(row))
    assert whole == CHATML.render([m._asdict() for m in row.messages], generate=False).rstrip("\n")
    assert learned == f"one{EOS}two{EOS}"


def test_a_greeting_of_the_assistant_is_read_and_not_learned():
    row = Row("", messages=_chat(("assistant", "hi"), ("user", "u"), ("assistant", "two")))
    assert texts(encoder(chat=CHATML).encode(row))[1] == f"two{EOS}"


def test_the_prompt_of_a_chat_is_what_a_generating_model_would_be_given():
    row = Row("", messages=_chat(("user", "u"), ("assistant", "two")))
    asked = CHATML.render([row.messages[0]._asdict()], generate=True)
    assert encoder(chat=CHATML).encode(row).prompt.tolist() == byte_tokenizer().encode(asked).ids


def test_an_end_is_added_to_a_chat_whose_template_writes_none():
    plain = Chat("{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}")
    row = Row("", messages=_chat(("user", "u"), ("assistant", "v")))
    assert texts(encoder(chat=plain).encode(row)) == (f"u:u\na:v\n{EOS}", f"a:v\n{EOS}")


def test_a_chat_that_cannot_be_rendered_is_refused_with_its_line():
    row = Row("data.jsonl, line 7", messages=_chat(("user", "u"), ("assistant", "v")))
    fickle = Chat("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
    strict = Chat("{{ raise_exception('only systems') }}")
    for chat, message in (
        (None, "no chat template"),
        (fickle, "does not render the first 1 messages as the beginning"),
        (strict, "only systems"),
    ):
        with pytest.raises(DataError, match=f"^data.jsonl, line 7: .*{message}"):
            encoder(chat=chat).encode(row)


def test_a_long_row_loses_the_beginning_of_its_prompt_and_says_how_much():
    row = Row("data.jsonl, line 3", "0123456789", "abcdef")
    found = encoder(10).encode(row)
    assert texts(found) == (f"789abcdef{EOS}", f"abcdef{EOS}")
    assert found.cut == 7
    assert texts(encoder(10, bos=BOS_ID).encode(row))[0] == f"{BOS}89abcdef{EOS}"
    assert texts(encoder(8).encode(row))[0] == f"9abcdef{EOS}"
    with pytest.raises(DataError, match=r"line 3: the last answer has 7 tokens, .* may have 7"):
        encoder(7).encode(row)
    chat = Row(
        "", messages=_chat(("user", "t"), ("assistant", "one"), ("user", "u"), ("assistant", "two"))
    )
    assert texts(encoder(25, chat=CHATML).encode(chat))[1] == f"two{EOS}"


def test_rows_that_cannot_be_encoded_are_counted_or_an_error():
    rows = [Row("line 1", "a", "b"), Row("line 2", "a", "b" * 20)]
    found = encode_rows(encoder(10), rows, skip_bad=True)
    assert len(found.rows) == 1
    assert found.skipped[0].startswith("line 2: the last answer has 21 tokens")
    with pytest.raises(DataError, match="line 2"):
        encode_rows(encoder(10), rows)
    with pytest.raises(DataError, match="no row can be used; the first: line 2"):
        encode_rows(encoder(10), rows[1:], skip_bad=True)


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(DataError, match=r"no token that ends an answer.*eos_token"):
        encoder(eos=())
    with pytest.raises(DataError, match="length must be at least 3 tokens, found 2"):
        encoder(2)


def _chat(*turns):
    return tuple(Message(*turn) for turn in turns)


# -- packing --


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(30, 64))
def test_first_fit_puts_each_row_in_one_bin_and_no_bin_overflows(sizes, width):
    bins = first_fit(sizes, range(len(sizes)), width)
    assert sorted(row for each in bins for row in each) == list(range(len(sizes)))
    assert all(0 < sum(sizes[row] for row in each) <= width for each in bins)
    assert sum(2 * sum(sizes[row] for row in each) <= width for each in bins) <= 1


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(1, 5), st.sampled_from([None, 32]), st.integers(0, 3))
def test_an_epoch_holds_each_row_once_in_full_groups(sizes, group, width, seed):
    groups = plan(sizes, group, width, seed, epoch=0)
    rows = [row for bins, _ in groups for each in bins for row in each]
    assert sorted(rows) == list(range(len(sizes)))
    assert all(len(bins) == group for bins, _ in groups)
    assert all(sum(sizes[row] for row in each) <= wide for bins, wide in groups for each in bins)
    assert sum(() in bins for bins, _ in groups) <= 1
    assert groups == plan(sizes, group, width, seed, epoch=0)


def test_epochs_and_seeds_differ():
    plans = [plan([3] * 50, 2, None, *at) for at in ((0, 0), (0, 1), (1, 0))]
    assert all(one != other for one, other in zip(plans, plans[1:] + plans[:1], strict=True))


def test_without_packing_rows_lie_among_rows_of_about_their_length():
    sizes = [10] * 8 + [100] * 8
    groups = plan(sizes, 4, None, 0, 0)
    assert sorted(width for _, width in groups) == [16, 16, 104, 104]
    assert widths(100) == [16, 32, 56, 104]


# -- batches --


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.booleans(), st.integers(1, 3), st.integers(1, 2))
def test_every_learned_token_is_asked_once_where_the_token_before_it_is_read(
    lengths, packing, batch, accumulation
):
    rows = rows_of(lengths)
    made = Batches(rows, batch=batch, accumulation=accumulation, length=32, packing=packing)
    asked = []
    for step in range(made.steps):
        one = made.read(step)
        assert one.tokens.ndim == (3 if accumulation > 1 else 2)
        at = np.take_along_axis(one.tokens, one.positions, -1)
        segment = np.take_along_axis(one.segments, one.positions, -1)
        real = one.weights > 0
        assert (at[real] + 1 == one.labels[real]).all()  # tokens of a row follow one another
        assert (segment[real] > 0).all()
        asked += one.labels[real].tolist()
    assert sorted(asked) == sorted(t for row in rows for t in row.tokens[row.answer].tolist())


def test_rows_of_a_bin_are_segments_from_1_with_offsets_from_0():
    rows = rows_of([4, 6])
    one = Batches(rows, batch=1, length=10).read(0)
    first, second = sorted(rows, key=lambda row: int(row.tokens[0] != one.tokens[0, 0]))
    sizes = [len(row.tokens) - 1 for row in (first, second)]
    read = [*first.tokens[:-1], *second.tokens[:-1], 0, 0]
    assert one.tokens[0].tolist() == read
    assert one.segments[0].tolist() == [1] * sizes[0] + [2] * sizes[1] + [0, 0]
    assert one.offsets[0].tolist() == [*range(sizes[0]), *range(sizes[1]), 0, 0]


def test_packed_and_unpacked_epochs_ask_for_the_same():
    rows = rows_of([5, 9, 3, 12, 7, 7])
    found = []
    for packing in (True, False):
        made = Batches(rows, batch=2, length=16, packing=packing)
        parts = [made.read(step) for step in range(made.steps)]
        found.append(
            sorted(
                (label, offset)
                for part in parts
                for label, offset, weight in zip(
                    part.labels.ravel(),
                    np.take_along_axis(part.offsets, part.positions, -1).ravel(),
                    part.weights.ravel(),
                    strict=True,
                )
                if weight
            )
        )
    assert found[0] == found[1]


def test_steps_are_known_for_whole_epochs_fractions_and_any_number():
    rows = rows_of([5] * 10)

    def steps(**options):
        return Batches(rows, batch=1, accumulation=2, length=7, **options).steps

    assert [steps(epochs=epochs) for epochs in (1, 2, 0.5, 2.2, 0.01)] == [5, 10, 3, 11, 1]
    assert steps(steps=13) == 13


def test_a_run_goes_on_with_the_batches_that_were_left():
    rows = rows_of([5, 9, 3, 12, 7, 7, 4, 4])
    options = {"batch": 2, "length": 16, "epochs": 3, "seed": 5}
    before = Batches(rows, **options).iterator()
    for _ in range(4):
        next(before)
    state = json.loads(json.dumps(before.get_state()))
    after = Batches(rows, **options).iterator(state)
    left = list(before)
    assert len(left) == Batches(rows, **options).steps - 4
    for one, other in zip(left, after, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_processes_that_read_their_own_rows_read_the_same_batch_together():
    made = Batches(rows_of([5] * 24), batch=4, accumulation=2, length=8)
    whole, parts = made.read(1), [made.read(1, rows) for rows in ([0, 1], [2, 3])]
    joined = [np.concatenate(fields, axis=1) for fields in zip(*parts, strict=True)]
    jax.tree.map(np.testing.assert_array_equal, tuple(whole), tuple(joined))


@pytest.mark.parametrize("rows", [None, 4])
def test_a_placed_batch_is_global_and_split_over_its_rows(rows):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    made = Batches(rows_of([5] * 8), batch=4, accumulation=2, length=8)
    assert local_rows(sharding, (2, 4, 8)) == [0, 1, 2, 3]
    batch = made.read(0, local_rows(sharding, (2, 4, 8)))
    placed = place(batch, sharding, rows)
    assert placed.tokens.sharding == sharding
    assert placed.tokens.addressable_shards[0].data.shape == (2, 1, 8)
    jax.tree.map(np.testing.assert_array_equal, placed, batch)


def test_stats_tell_what_was_cut_and_how_much_is_padding():
    rows = (*rows_of([9, 9]), rows_of([5])[0]._replace(cut=3))
    stats = Batches(rows, batch=2, length=16).stats
    assert (stats.rows, stats.tokens, stats.cut_rows, stats.cut_tokens) == (3, 23, 1, 3)
    assert stats.answer_tokens == sum(int(row.answer.sum()) for row in rows)
    assert stats.padding == pytest.approx(1 - 20 / 32)
    assert str(stats) == (
        f"3 rows, 23 tokens, {stats.answer_tokens} of them learned; 3 tokens cut from 1 rows that "
        "were too long; batches 16 (8 asked) tokens wide, 38% padding"
    )


def test_the_fingerprint_tells_other_data_and_another_order_apart():
    rows = rows_of([5] * 10)
    options = {"batch": 2, "length": 8}
    same = Batches(rows, **options).fingerprint()
    assert same == Batches(rows, **options).fingerprint()
    others = [
        Batches(rows[:-1], **options),
        Batches((rows[0]._replace(tokens=rows[0].tokens + 1), *rows[1:]), **options),
        Batches(rows, **options, seed=1),
        Batches(rows, **options, packing=False, epochs=2),
    ]
    assert same not in [other.fingerprint() for other in others]


def test_a_row_that_is_too_long_or_no_row_is_refused():
    with pytest.raises(DataError, match="rows of at most 8 tokens, found one of 9"):
        Batches(rows_of([9]), batch=1, length=8)
    with pytest.raises(DataError, match="rows of at most 8 tokens, found no row"):
        Batches((), batch=1, length=8)


def test_evaluation_asks_every_row_once_in_order_and_in_one_shape():
    rows = rows_of([5, 9, 3])
    found = fixed(rows, batch=2, length=32)
    assert [batch.tokens.shape for batch in found] == [(2, 8), (2, 8)]
    kept = [batch.tokens[n] for batch in found for n in range(2)]
    for row, tokens in zip(rows, kept[:3], strict=True):
        assert tokens[: len(row.tokens) - 1].tolist() == row.tokens[:-1].tolist()
    assert not found[1].weights[1].any()
    assert found[1].segments[1].tolist() == [0] * 8


@pytest.mark.parametrize(("name", "train", "held"), [("elements", 200, 50), ("devil", 553, 40)])
def test_the_shipped_data_is_clean_and_what_is_held_out_is_not_learned(name, train, held):
    folder = Path(finetune.rows.__file__).parent
    rows, asked = (read_rows(folder / f"{name}{end}.jsonl").rows for end in ("", "_test"))
    assert (len(rows), len(asked)) == (train, held)
    assert not {row.prompt for row in rows} & {row.prompt for row in asked}
    assert len({row.prompt for row in rows}) == train
