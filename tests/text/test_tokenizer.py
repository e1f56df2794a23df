"""Tokenizer: special tokens, ends of text, chat templates; the text itself is in test_detokenizer."""

import subprocess
import sys

import pytest
import sentencepiece

from mlx_edge.errors import InvalidRequestError, ModelFormatError, UnsupportedModelError
from mlx_edge.text import load_tokenizer
from tests.text import conftest

HELLO = [{"role": "user", "content": "hello"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}{{ eos_token }}{% endfor %}"
)


def user_token(token_id: int, **flags) -> dict:
    return {str(token_id): {"content": "<|user|>", "special": True, **flags}}


def spell(tokenizer, ids) -> list[str]:
    return [tokenizer.id_to_token(index) for index in ids]


class TestJson:
    def test_the_post_processor_adds_bos(self, make_folder, byte_level):
        tokenizer = load_tokenizer(make_folder(tokenizer_json=byte_level))
        plain = tokenizer.encode("hello world", add_special_tokens=False)
        assert plain == byte_level.encode("hello world", add_special_tokens=False).ids
        assert tokenizer.encode("hello world") == [0, *plain]
        assert tokenizer.decode([0, *plain]) == "<|begin|>hello world"
        assert tokenizer.decode([0, *plain], skip_special_tokens=True) == "hello world"

    def test_tokenizer_config_outranks_the_post_processor(self, make_folder, byte_level):
        names = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>", "lstrip": False}}
        config = {**names, "add_bos_token": False, "add_eos_token": True}
        folder = make_folder(tokenizer_json=byte_level, tokenizer_config_json=config)
        tokenizer = load_tokenizer(folder)
        assert tokenizer.encode("") == [1]
        assert tokenizer.encode("", add_special_tokens=False) == []
        assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|begin|>", 0)
        assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|end|>", 1)

    def test_truncation_and_padding_of_the_file_are_off(self, make_folder):
        raw = conftest.train_byte_level()
        raw.enable_truncation(2)
        raw.enable_padding(length=50)
        tokenizer = load_tokenizer(make_folder(tokenizer_json=raw))
        assert tokenizer.decode(tokenizer.encode("the quick brown fox", False)) == (
            "the quick brown fox"
        )

    def test_tokens_of_the_config_are_added(self, make_folder, byte_level):
        size = byte_level.get_vocab_size()
        config = {"added_tokens_decoder": user_token(size, rstrip=True)}
        tokenizer = load_tokenizer(
            make_folder(tokenizer_json=byte_level, tokenizer_config_json=config)
        )
        assert tokenizer.vocab_size == size + 1
        ids = tokenizer.encode("a<|user|>  b<plain>", add_special_tokens=False)
        assert spell(tokenizer, ids) == ["a", "<|user|>", "b", "<plain>"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<plain>"

    def test_a_token_whose_id_contradicts_is_refused(self, make_folder, byte_level):
        config = {"added_tokens_decoder": user_token(9000)}
        folder = make_folder(tokenizer_json=byte_level, tokenizer_config_json=config)
        with pytest.raises(ModelFormatError, match=r"'<\|user\|>' the id 9000.*it would be"):
            load_tokenizer(folder)

    def test_clean_up_is_ignored_for_bpe_only(self, make_folder, byte_level):
        config = {"clean_up_tokenization_spaces": True}
        tokenizer = load_tokenizer(
            make_folder(tokenizer_json=byte_level, tokenizer_config_json=config)
        )
        assert tokenizer.decode(tokenizer.encode("a , b", False)) == "a , b"
        words = conftest.train_word_piece()
        with pytest.raises(UnsupportedModelError, match="clean_up_tokenization_spaces"):
            load_tokenizer(make_folder(tokenizer_json=words, tokenizer_config_json=config))

    def test_it_outranks_tokenizer_model_even_when_broken(self, make_folder, sentencepiece_model):
        folder = make_folder(tokenizer_json="{}", tokenizer_model=sentencepiece_model)
        with pytest.raises(ModelFormatError, match=r"tokenizer\.json is not a tokenizer"):
            load_tokenizer(folder)


class TestSentencePiece:
    @pytest.fixture
    def load(self, make_folder, sentencepiece_model):
        def load(**config):
            return load_tokenizer(
                make_folder(tokenizer_model=sentencepiece_model, tokenizer_config_json=config)
            )

        return load

    def test_bos_stands_before_a_text_unless_the_config_says_no(self, load):
        raw = sentencepiece.SentencePieceProcessor(model_proto=conftest.train_sentencepiece())
        plain = raw.encode("hello world")
        assert load().encode("hello world") == [1, *plain]
        assert load().encode("hello world", add_special_tokens=False) == plain
        assert load(add_bos_token=False, add_eos_token=True).encode("hello world") == [*plain, 2]
        assert (load().bos_token, load().eos_token, load().eos_token_ids) == ("<s>", "</s>", {2})

    def test_special_tokens_in_a_text_are_single_ids(self, load):
        tokenizer = load(added_tokens_decoder=user_token(400))
        assert tokenizer.vocab_size == 401
        ids = tokenizer.encode("the<s>the the</s> the<ctl><|user|>the<tool>")
        expected = "<s> ▁the <s> the ▁the </s> ▁the <ctl> <|user|> the <tool>"
        assert "".join(spell(tokenizer, ids)) == expected.replace(" ", "")
        assert tokenizer.encode("<s>") == [1, 1]
        text = "<s>the<s>the the</s> the<ctl><|user|>the<tool>"
        assert tokenizer.decode(ids) == text.replace("<s>the<s>", "<s> the<s>")
        assert tokenizer.decode(ids, skip_special_tokens=True) == "thethe the thethe<tool>"

    def test_no_space_is_invented_behind_a_special_token(self, load):
        def spelled(text, **config):
            tokenizer = load(**config)
            return "".join(spell(tokenizer, tokenizer.encode(text, add_special_tokens=False)))

        assert spelled("the</s>the") == "▁the</s>the"
        assert spelled("<s>the") == "<s>the"
        assert spelled("<tool>the") == "<tool>the"
        assert spelled("the<tool>the") == "▁the<tool>the"
        assert spelled("the</s>the", legacy=True) == "▁the</s>▁the"
        assert spelled("the</s>the", add_prefix_space=False) == "the</s>the"

    def test_flags_of_added_tokens(self, load):
        tokenizer = load(added_tokens_decoder=user_token(400, lstrip=True, rstrip=True))
        ids = tokenizer.encode("the <|user|> \n the", add_special_tokens=False)
        assert "".join(spell(tokenizer, ids)) == "▁the<|user|>the"
        tokenizer = load(added_tokens_decoder={"400": {"content": "and", "single_word": True}})
        ids = tokenizer.encode("sand and", add_special_tokens=False)
        assert [index == 400 for index in ids].count(True) == 1
        assert ids[-1] == 400

    def test_the_longest_special_token_wins(self, load):
        contents = ["<a", "<a>", "<a>>"]
        added = {str(400 + rank): {"content": text} for rank, text in enumerate(contents)}
        tokenizer = load(added_tokens_decoder=added)
        assert tokenizer.encode("<a>><a><a", add_special_tokens=False) == [402, 401, 400]

    def test_spaces_behind_special_tokens_survive_a_normalizer_that_drops_them(self, make_folder):
        model = conftest.train_sentencepiece(remove_extra_whitespaces=True)
        tokenizer = load_tokenizer(make_folder(tokenizer_model=model))
        for text in ("<s>the</s> the<s>the", "<s>the</s>the"):
            assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text

    def test_a_token_whose_id_contradicts_is_refused(self, load):
        with pytest.raises(ModelFormatError, match=r"'<tool>' the id 7, but in .* it is 4"):
            load(added_tokens_decoder={"7": {"content": "<tool>"}})

    def test_spaces_behind_words_are_refused(self, make_folder):
        model = conftest.train_sentencepiece(treat_whitespace_as_suffix=True)
        with pytest.raises(UnsupportedModelError, match="treat_whitespace_as_suffix"):
            load_tokenizer(make_folder(tokenizer_model=model))


class TestEndOfText:
    @pytest.mark.parametrize(
        ("generation", "config", "expected"),
        [
            (None, None, {1}),
            ({"eos_token_id": 5}, {"eos_token_id": 6}, {1, 5}),
            ({"eos_token_id": [5, 7]}, None, {1, 5, 7}),
            ({"eos_token_id": None}, {"eos_token_id": [6]}, {1, 6}),
            (None, {"text_config": {"eos_token_id": 6}}, {1, 6}),
        ],
    )
    def test_ids(self, make_folder, byte_level, generation, config, expected):
        files = {"generation_config_json": generation, "config_json": config}
        folder = make_folder(
            tokenizer_json=byte_level,
            special_tokens_map_json={"eos_token": "<|end|>"},
            **{name: content for name, content in files.items() if content is not None},
        )
        assert load_tokenizer(folder).eos_token_ids == expected

    def test_more_can_be_added(self, make_folder, byte_level):
        tokenizer = load_tokenizer(make_folder(tokenizer_json=byte_level))
        assert tokenizer.eos_token_ids == frozenset()
        tokenizer.add_eos_token("<|end|>")
        tokenizer.add_eos_token("17")
        assert tokenizer.eos_token_ids == {1, 17}
        for wrong in ("<|nothing|>", "99999", "-1", "9" * 5000):
            with pytest.raises(InvalidRequestError, match="no token of this vocabulary"):
                tokenizer.add_eos_token(wrong)

    @pytest.mark.parametrize(
        "files",
        [
            {"generation_config_json": {"eos_token_id": 9999}},
            {"tokenizer_config_json": {"eos_token": "<|nothing|>"}},
            {"tokenizer_config_json": {"add_bos_token": True}},
        ],
    )
    def test_what_the_vocabulary_lacks_is_refused(self, make_folder, byte_level, files):
        with pytest.raises(ModelFormatError, match=r"eos_token|bos_token") as caught:
            load_tokenizer(make_folder(tokenizer_json=byte_level, **files))
        assert "\n" not in str(caught.value)


class TestChatTemplate:
    @pytest.fixture
    def load(self, make_folder, sentencepiece_model):
        def load(template=None, **files):
            config = {"added_tokens_decoder": user_token(400)}
            if template is not None:
                config["chat_template"] = template
            return load_tokenizer(
                make_folder(
                    tokenizer_model=sentencepiece_model, tokenizer_config_json=config, **files
                )
            )

        return load

    def test_the_template_writes_bos_itself(self, load):
        tokenizer = load(TEMPLATE)
        assert tokenizer.apply_chat_template(HELLO, tokenize=False) == "<s><|user|>hello</s>"
        ids = tokenizer.apply_chat_template(HELLO)
        assert "".join(spell(tokenizer, ids)) == "<s><|user|>hello</s>"
        assert [ids.count(index) for index in (1, 400, 2)] == [1, 1, 1]

    def test_spellings(self, load):
        several = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
        for tokenizer in (load(several), load({"default": "d", "tool_use": "t"})):
            assert tokenizer.apply_chat_template(HELLO, tokenize=False) == "d"
            assert tokenizer.apply_chat_template(HELLO, tokenize=False, tools=[{}]) == "t"
            named = tokenizer.apply_chat_template(HELLO, tokenize=False, chat_template="tool_use")
            assert named == "t"
        tokenizer = load("c", chat_template_jinja="j", chat_template_json={"chat_template": "o"})
        assert tokenizer.apply_chat_template(HELLO, tokenize=False) == "j"
        tokenizer = load(chat_template_json={"chat_template": "o"})
        assert tokenizer.apply_chat_template(HELLO, tokenize=False) == "o"

    def test_a_template_and_variables_can_be_given(self, load):
        text = load().apply_chat_template(
            HELLO, tokenize=False, chat_template="{{ enable_thinking }}", enable_thinking=False
        )
        assert text == "False"

    def test_without_a_template(self, load):
        tokenizer = load()
        assert not tokenizer.has_chat_template
        assert load(TEMPLATE).has_chat_template
        with pytest.raises(InvalidRequestError, match="no chat template; give the prompt as plain"):
            tokenizer.apply_chat_template(HELLO)
        with pytest.raises(InvalidRequestError, match="only 'rag'"):
            load({"rag": "r"}).apply_chat_template(HELLO)

    def test_arguments_of_others_are_not_ignored(self, load):
        with pytest.raises(InvalidRequestError, match="continue_final_message"):
            load(TEMPLATE).apply_chat_template(HELLO, continue_final_message=True)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(ModelFormatError, match=r"expected tokenizer\.json or tokenizer\.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["json", "model"])
def test_half_a_surrogate_pair_is_refused(make_folder, byte_level, sentencepiece_model, kind):
    files = {"tokenizer_json": byte_level, "tokenizer_model": sentencepiece_model}
    tokenizer = load_tokenizer(make_folder(**{f"tokenizer_{kind}": files[f"tokenizer_{kind}"]}))
    with pytest.raises(InvalidRequestError, match="surrogate pair at character 2"):
        tokenizer.encode("ab\ud83d")


@pytest.mark.parametrize("kind", ["json", "model"])
def test_only_what_is_needed_is_imported(make_folder, byte_level, sentencepiece_model, kind):
    files = {"tokenizer_json": byte_level, "tokenizer_model": sentencepiece_model}
    folder = make_folder(**{f"tokenizer_{kind}": files[f"tokenizer_{kind}"]})
    code = (
        "import sys, pathlib, mlx_edge.text as text\n"
        "heavy = {'tokenizers', 'sentencepiece', 'jinja2', 'mlx', 'numpy', 'transformers'}\n"
        "assert not heavy & set(sys.modules)\n"
        f"tokenizer = text.load_tokenizer(pathlib.Path({str(folder)!r}))\n"
        "assert tokenizer.decode(tokenizer.encode('hello', False)) == 'hello'\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    needed = {"json": "tokenizers", "model": "sentencepiece"}[kind]
    assert needed in done.stdout.split()
    assert not {"jinja2", "mlx", "transformers"} & set(done.stdout.split())
