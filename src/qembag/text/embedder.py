"""TextEmbedder: the vector of a text is the mean of its tokens' rows."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .. import _arguments, _errors
from .._runtime import get_num_threads
from ..base import Table
from ..float_table import FloatTable
from ..formats.sources import read_ahead
from ..lookup import embedding_bag
from . import tokenizer as tokenizers
from .texts import as_texts, check_unicode

if TYPE_CHECKING:
    import os
    from collections.abc import Generator, Iterable

    from numpy.typing import NDArray

    from ..table import QuantizedTable

# Texts that are tokenized at a time. On an AMD Zen 4, batches of 256 to 4096 texts of 80 tokens took the same time.
BATCH_SIZE = 1024
ONE_BAG = np.zeros(1, np.int64)
ONE_BAG.flags.writeable = False
# model2vec's, so that zeros stay zeros. It changes no norm above 1e-24.
TINY = np.float32(1e-32)


class TextEmbedder:
    """Vectors of texts: a tokenizer makes numbers of rows of a text, a lookup pools those rows.

    `TextEmbedder.load` reads models of model2vec, sentence-transformers (StaticEmbedding) and WordLlama, with the rules
    of each. Special tokens are left out. A text without tokens gets zeros. One embedder may be used by many threads.

    Parameters
    ----------
    table : QuantizedTable, FloatTable or ndarray of floats, shape (num_tokens, dim)
        A row for each token of the tokenizer. Its `row_weights`, if it has some, weight the rows.
    tokenizer : tokenizers.Tokenizer, or a fast tokenizer of transformers
        It is copied.
    mode : {"mean", "sum", "max", "average", "sqrtn"}
        As for `embedding_bag`, except that "mean" divides the sum by the number of tokens for tables of any kind.
    normalize : bool
        Divide each vector by its Euclidean norm.
    max_length : int, optional
        The most tokens of a text that are used, the first ones. The tokenizer's own setting if not given.
    max_characters : int, optional
        Cut texts to this length before they are tokenized.
    drop_unknown : bool
        Leave out the tokenizer's token for unknown words, after the text is cut to `max_length` tokens.
    invalid : {"raise", "clip"}
        What to do with a token beyond the table: an error, or the last row in its place.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described; if the tokenizer cannot be copied.
    ImportError
        If tokenizers is not installed (``pip install 'qembag[text]'``).

    Examples
    --------
    >>> import numpy as np
    >>> from qembag.text import TextEmbedder
    >>> from tokenizers import Tokenizer, models, pre_tokenizers  # doctest: +SKIP
    >>> tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "table": 2}, "[UNK]"))  # doctest: +SKIP
    >>> tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # doctest: +SKIP
    >>> embedder = TextEmbedder(np.eye(3, dtype=np.float32), tokenizer)  # doctest: +SKIP
    >>> embedder(["a table", ""])  # doctest: +SKIP
    array([[0. , 0.5, 0.5],
           [0. , 0. , 0. ]], dtype=float32)
    """

    def __init__(
        self,
        table: QuantizedTable | FloatTable | NDArray[Any],
        tokenizer: Any,
        *,
        mode: Literal["mean", "sum", "max", "average", "sqrtn"] = "mean",
        normalize: bool = False,
        max_length: int | None = None,
        max_characters: int | None = None,
        drop_unknown: bool = False,
        invalid: Literal["raise", "clip"] = "raise",
    ) -> None:
        options = {
            "mode": mode,
            "normalize": normalize,
            "max_length": max_length,
            "max_characters": max_characters,
            "drop_unknown": drop_unknown,
            "invalid": invalid,
        }
        self._set(table, tokenizers.copied(tokenizer), options)

    @classmethod
    def _of(cls, table: Any, tokenizer: Any, options: dict[str, Any]) -> TextEmbedder:
        """An embedder with a tokenizer that nobody else has."""
        embedder = cls.__new__(cls)
        embedder._set(table, tokenizer, options)
        return embedder

    def _set(self, table: Any, tokenizer: Any, options: dict[str, Any]) -> None:
        if not isinstance(table, Table):
            if not isinstance(table, np.ndarray):
                raise TypeError(f"table must be a table or an array of floats, got {_errors.kind_of(table)}")
            table = FloatTable(table)
        options = checked_options(**options)
        tokenizer.no_padding()
        if options["max_length"] is not None:
            tokenizer.enable_truncation(options["max_length"])
        self._table, self._tokenizer, self._options = table, tokenizer, options
        self._row_weights = table.row_weights
        self._max_characters = options["max_characters"]
        self._unknown = tokenizers.unknown_of(tokenizer) if options["drop_unknown"] else None
        # A quantized table's own mean multiplies the sum by 1 / n. Static text models divide it.
        self._divides = options["mode"] == "mean" and not isinstance(table, FloatTable)
        self._mode: Any = "sum" if self._divides else options["mode"]
        self._look_up(np.empty(0, np.int64), ONE_BAG, None, None)  # refuses a mode that goes with no weights

    @property
    def table(self) -> QuantizedTable | FloatTable:
        table: QuantizedTable | FloatTable = self._table
        return table

    @property
    def tokenizer(self) -> Any:
        """A copy of the tokenizer, as it is used: without padding, cut to `max_length`."""
        return tokenizers.copied(self._tokenizer)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `TextEmbedder` other than its table and tokenizer."""
        return dict(self._options)

    @property
    def dim(self) -> int:
        return self.table.dim

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self._options.items())
        return f"TextEmbedder({self._table!r}{options})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restored, (type(self), self._table, self._tokenizer.to_str(), self._options))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        table: QuantizedTable | FloatTable | None = None,
        tokenizer: Any = None,
        normalize: bool | None = None,
        mmap: bool = True,
    ) -> TextEmbedder:
        """Load a model, with the rules of the library that it is of. The library itself is not needed.

        Parameters
        ----------
        path : str or path
            The folder of a model of model2vec or sentence-transformers, or one that `save` wrote; or the weights of
            WordLlama, a file.
        table : QuantizedTable or FloatTable, optional
            Rows to use in place of the model's, such as quantized ones; as many as those, at least.
        tokenizer : str, path or tokenizers.Tokenizer, optional
            The tokenizer or its file, if it is not where the library puts it.
        normalize : bool, optional
            Whether to normalize; as the model says if not given (WordLlama: no).
        mmap : bool
            As for `load_tables`.

        Returns
        -------
        TextEmbedder

        Raises
        ------
        OSError
            If a file cannot be read, or there is no tokenizer.
        ValueError
            Names the path and what is wrong: if it is no such model, or a file is damaged; if a sentence-transformers
            model has other parts than a StaticEmbedding and a Normalize, a prompt, or a dimension to cut vectors to.
        TypeError, ImportError
            As for `TextEmbedder`.
        """
        from .loading import load

        found, text, options = load(path, table, tokenizer, normalize, mmap)
        return cls._of(found, text, options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the table, the tokenizer and the options to a folder, which `load` reads.

        Parameters
        ----------
        path : str or path
            The folder; it is made if it is not there. Files ``table.safetensors`` and ``tokenizer.json`` in it are
            replaced.

        Raises
        ------
        OSError
            If a file cannot be written.
        """
        from .loading import save

        save(path, self._table, self._tokenizer, self._options)

    def __call__(
        self,
        texts: str | Iterable[str],
        *,
        out: NDArray[np.float32] | None = None,
        batch_size: int | None = None,
        num_threads: int | None = None,
    ) -> NDArray[np.float32]:
        """The vectors of texts.

        Parameters
        ----------
        texts : str, or iterable of str
            One text, or a list, an array, a column of Arrow or pandas, or any other iterable of texts.
        out : ndarray of float32, shape (dim,) or (num_texts, dim), optional
            Where to put the result; as for `embedding_bag`. After an error about a text, the rows of texts before it
            may be written.
        batch_size : int, optional
            Texts that are tokenized at a time, 1024 if not given. It limits the memory that this takes.
        num_threads : int, optional
            Threads of lookups; see `set_num_threads`. With two or more, one batch is pooled while the next is
            tokenized, in a thread that ends with the call. tokenizers starts threads of its own unless the environment
            says ``TOKENIZERS_PARALLELISM=false``.

        Returns
        -------
        ndarray of float32, shape (dim,) for one text, or (num_texts, dim)

        Raises
        ------
        TypeError
            Names the position of what is no string.
        IndexError
            Names the text with a token beyond the table, unless `invalid` is "clip".
        ValueError
            If tokenizers refuses a text that is not valid Unicode; if `out` is not as described.
        """
        size = BATCH_SIZE if batch_size is None else _at_least_1(batch_size, "batch_size")
        threads = get_num_threads() if num_threads is None else _arguments.num_threads(num_threads, "num_threads")
        if isinstance(texts, str):
            return self._one(texts, out, threads)
        texts = as_texts(texts)
        shape = (len(texts), self.dim)
        target, _ = _arguments.output_array(out, np.float32)
        vectors = _arguments.output(target, shape, _arguments.FLOAT32, ())
        if vectors is None:
            vectors = np.empty(shape, np.float32)
        starts = range(0, len(texts), size)
        with contextlib.closing(self._encodings(texts, starts, ahead=threads > 1)) as batches:
            for start, encodings in zip(starts, batches, strict=True):
                ids = [encoding.ids for encoding in encodings]
                self._pool(ids, vectors[start : start + size], start, threads)
        return vectors if out is None else out

    def _one(self, text: str, out: NDArray[np.float32] | None, threads: int) -> NDArray[np.float32]:
        target, _ = _arguments.output_array(out, np.float32)
        given = _arguments.output(target, (self.dim,), _arguments.FLOAT32, ())
        (encoding,) = self._encode([text], 0)
        ids = encoding.ids
        if self._unknown in ids:
            ids = [number for number in ids if number != self._unknown]
        vectors = None if given is None else given[None]
        vectors = self._found(np.array(ids, np.int64), ONE_BAG, len(ids), vectors, threads, 0)
        return vectors[0] if out is None else out

    def _encodings(self, texts: list[str], starts: range, *, ahead: bool) -> Generator[list[Any], None, None]:
        def encode(number: int) -> list[Any]:
            start = starts[number]
            return self._encode(texts[start : start + starts.step], start)

        if ahead and len(starts) > 1:
            yield from read_ahead(encode, len(starts))
        else:
            yield from map(encode, range(len(starts)))

    def _encode(self, texts: list[str], start: int) -> list[Any]:
        if self._max_characters is not None:
            texts = [text[: self._max_characters] for text in texts]
        try:
            # `encode_batch_fast` counts no offsets, which nothing needs here.
            encodings: list[Any] = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:
            check_unicode(texts, start)
            raise ValueError(f"texts must be texts that the tokenizer can encode: {error}") from error
        return encodings

    def _pool(self, ids: list[list[int]], out: NDArray[np.float32], start: int, threads: int) -> None:
        """Write the vectors of texts from their tokens; `start` is the number of the first text."""
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        indices = np.fromiter(itertools.chain.from_iterable(ids), np.int64, int(lengths.sum()))
        if self._unknown is not None:
            is_known = indices != self._unknown
            if not is_known.all():
                ends = np.cumsum(lengths)
                known = np.concatenate([[0], np.cumsum(is_known)])
                lengths, indices = known[ends] - known[ends - lengths], indices[is_known]
        self._found(indices, np.cumsum(lengths) - lengths, lengths[:, None], out, threads, start)

    def _found(
        self, indices: NDArray[np.int64], offsets: NDArray[np.int64], counts: Any, out: Any, threads: int, start: int
    ) -> NDArray[np.float32]:
        if self._options["invalid"] == "clip":
            indices = np.minimum(indices, len(self._table) - 1)
        try:
            vectors = self._look_up(indices, offsets, out, threads)
        except IndexError as error:
            raise self._beyond(indices, offsets, start) or error from None
        if self._divides:
            vectors /= np.maximum(counts, 1).astype(np.float32)
        if self._options["normalize"]:
            _arguments.quietly(_normalize, vectors)
        return vectors

    def _look_up(self, indices: NDArray[np.int64], offsets: Any, out: Any, threads: int | None) -> NDArray[np.float32]:
        weights = None if self._row_weights is None else self._row_weights[indices]
        return embedding_bag(
            self._table,
            indices,
            offsets,
            mode=self._mode,
            per_sample_weights=weights,
            out=out,
            num_threads=threads,
        )

    def _beyond(self, indices: NDArray[np.int64], offsets: NDArray[np.int64], start: int) -> IndexError | None:
        """The error for the first token that has no row."""
        wrong = np.flatnonzero(indices >= len(self._table))
        if not len(wrong):
            return None
        number = int(indices[wrong[0]])
        text = start + int(np.searchsorted(offsets, wrong[0], side="right")) - 1
        return IndexError(
            f"texts[{text}] has token {number}, {_errors.shown(self._tokenizer.id_to_token(number))}: "
            f"out of range for a table of {len(self._table)} rows"
        )


def _normalize(vectors: NDArray[np.float32]) -> None:
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + TINY


def _at_least_1(value: object, name: str) -> int:
    number = _arguments.whole_number(value, name)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {_errors.shown(number)}")
    return min(number, 2**31 - 1)  # a longer text does not fit tokenizers' numbers


def checked_options(
    mode: object, normalize: object, max_length: object, max_characters: object, drop_unknown: object, invalid: object
) -> dict[str, Any]:
    _arguments.mode(mode)
    invalid = _arguments.exact_text(invalid) or invalid
    if invalid not in ("raise", "clip"):
        raise ValueError(f"invalid must be 'raise' or 'clip', got {_errors.shown(invalid)}")
    return {
        "mode": _arguments.exact_text(mode),
        "normalize": _arguments.flag(normalize, "normalize"),
        "max_length": None if max_length is None else _at_least_1(max_length, "max_length"),
        "max_characters": None if max_characters is None else _at_least_1(max_characters, "max_characters"),
        "drop_unknown": _arguments.flag(drop_unknown, "drop_unknown"),
        "invalid": invalid,
    }


def _restored(kind: type[TextEmbedder], table: Any, text: str, options: dict[str, Any]) -> TextEmbedder:
    return kind._of(table, tokenizers.tokenizer_class().from_str(text), options)
