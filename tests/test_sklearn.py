"""`EmbeddingBagTransformer`: scikit-learn's own checks, pipelines, and both kinds of input."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest

import qembag

pytest.importorskip("sklearn", minversion="1.6")

import scipy.sparse
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.utils.estimator_checks import estimator_checks_generator

from qembag.sklearn import EmbeddingBagTransformer

ROWS, DIM = 200, 6
WEIGHTS = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
TABLES = {
    "8 bits": qembag.quantize(WEIGHTS, 8),
    "4 bits": qembag.quantize(WEIGHTS, 4),
    "float16": qembag.FloatTable(WEIGHTS.astype(np.float16)),
    "pruned": qembag.quantize(WEIGHTS, 8).prune(np.arange(0, ROWS, 2)),
    "array": WEIGHTS,
}
TABLE = TABLES["8 bits"]
TEXTS = ["a cat and a dog", "a dog", "", "the cat of the house", "a house and a house", "birds"]


# ---- scikit-learn's own checks ---------------------------------------------------------------------------------------


def own_checks():
    made = [EmbeddingBagTransformer(table) for table in TABLES.values()]
    made += [EmbeddingBagTransformer(TABLE, mode=mode) for mode in ("mean", "average", "sqrtn")]
    made += [EmbeddingBagTransformer(TABLE, dtype="float16", invalid="skip", num_threads=2)]
    for estimator in made:
        yield from estimator_checks_generator(estimator, legacy=True)


def name_of(value):
    return getattr(getattr(value, "func", value), "__name__", type(value).__name__)


@pytest.mark.parametrize(("estimator", "check"), list(own_checks()), ids=name_of)
def test_scikit_learns_own_checks_pass(estimator, check):
    """All of them: none is expected to fail."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        check(estimator)


def test_many_checks_are_run():
    assert len({name_of(check) for _, check in own_checks()}) > 30


# ---- input="features" ------------------------------------------------------------------------------------------------


def features(rng, columns=ROWS, rows=9):
    matrix = rng.normal(size=(rows, columns)).astype(np.float32)
    matrix[rng.random(matrix.shape) < 0.8] = 0
    return matrix


def values_of(table):
    return table if isinstance(table, np.ndarray) else table.dequantize()


@pytest.mark.parametrize("columns", [ROWS, 30, 1])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_features_are_multiplied_by_the_table(rng, table, columns):
    X = features(rng, columns)
    found = EmbeddingBagTransformer(table).fit_transform(X)
    np.testing.assert_allclose(found, X @ values_of(table)[:columns].astype(np.float32), rtol=1e-5, atol=1e-5)
    assert found.dtype == np.float32


def with_zeros(X):
    """Of the first five columns of the first row, whatever they hold."""
    filled = X.copy()
    filled[0, :5] = 1
    matrix = scipy.sparse.csr_array(filled)
    matrix.data[:5] = 0
    return matrix


FORMS = {
    "dense": lambda X: X,
    "float64": lambda X: X.astype(np.float64),
    "column by column": np.asfortranarray,
    "csr_matrix": scipy.sparse.csr_matrix,
    "csr_array": scipy.sparse.csr_array,
    "csc": scipy.sparse.csc_array,
    "coo": scipy.sparse.coo_array,
    "csr of float64": lambda X: scipy.sparse.csr_array(X.astype(np.float64)),
    "explicit zeros": with_zeros,
}


@pytest.mark.parametrize("mode", ["sum", "mean", "average", "sqrtn"])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_matrix_gives_the_same_bits(rng, form, mode, same_bits):
    X = features(rng)
    X[0, :5] = 0
    model = EmbeddingBagTransformer(TABLE, mode=mode).fit(X)
    same_bits(model.transform(FORMS[form](X)), model.transform(scipy.sparse.csr_array(X)))


def test_the_callers_matrix_stays_as_it_was(rng):
    matrix = with_zeros(features(rng))
    before = copy.deepcopy(matrix)
    EmbeddingBagTransformer(TABLE, mode="mean").fit_transform(matrix)
    assert np.array_equal(matrix.indptr, before.indptr)
    assert np.array_equal(matrix.data, before.data)


def test_a_mean_counts_what_is_not_zero():
    model = EmbeddingBagTransformer(qembag.FloatTable(np.array([[6], [9], [100]], np.float32)), mode="mean")
    assert model.transform([[1, 1, 0], [0, 2, 0], [0, 0, 0]]).tolist() == [[7.5], [18], [0]]


def test_more_columns_than_rows_are_refused_or_skipped(rng, same_bits):
    X = features(rng, ROWS + 3)
    message = rf"^X must have at most {ROWS} features, one for each row of the table, got {ROWS + 3}$"
    for call in (EmbeddingBagTransformer(TABLE).fit, EmbeddingBagTransformer(TABLE).transform):
        with pytest.raises(ValueError, match=message):
            call(X)
    same_bits(
        EmbeddingBagTransformer(TABLE, invalid="skip").fit_transform(X),
        EmbeddingBagTransformer(TABLE).fit_transform(X[:, :ROWS]),
    )


def test_it_works_without_fit(rng, same_bits):
    X = features(rng)
    same_bits(EmbeddingBagTransformer(TABLE).transform(X), EmbeddingBagTransformer(TABLE).fit(X[:1]).transform(X))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"input": "text"}, ValueError, r"^input must be 'features' or 'indices', got 'text'$"),
        ({"mode": "median"}, ValueError, r"^mode must be"),
        ({"mode": "max"}, ValueError, r"^mode must not be 'max' for a sparse matrix"),
        ({"padding_idx": ROWS}, ValueError, r"^padding_idx must be from"),
        ({"invalid": "ignore"}, ValueError, r"^invalid must be"),
        ({"dtype": "float64"}, ValueError, r"^dtype must be"),
        ({"num_threads": 0}, ValueError, r"^num_threads must be"),
        ({"num_threads": 1.5}, TypeError, r"^num_threads must be"),
    ],
)
def test_wrong_parameters_are_errors_of_fit_and_not_before(options, kind, message):
    model = EmbeddingBagTransformer(TABLE, **options)
    with pytest.raises(kind, match=message):
        model.fit([[1.0, 2.0]])


@pytest.mark.parametrize(
    "table", [None, "words", [[1.0, 2.0]], WEIGHTS.astype(np.float64), WEIGHTS[0], np.eye(3, dtype=int)]
)
@pytest.mark.parametrize("input", ["features", "indices"])
def test_what_is_no_table_is_an_error_of_fit(table, input):
    with pytest.raises((TypeError, ValueError), match=r"^table must "):
        EmbeddingBagTransformer(table, input=input).fit([[1, 2]])


# ---- input="indices" -------------------------------------------------------------------------------------------------

BAGS = [[3, 1, 3], [], [199], [0, 5]]


def by_bags(bags=BAGS, **options):
    flat = np.array([index for bag in bags for index in bag], np.int64)
    return qembag.embedding_bag(TABLE, flat, lengths=[len(bag) for bag in bags], **options)


def column_of(bags):
    column = np.empty(len(bags), object)
    for number, bag in enumerate(bags):
        column[number] = np.array(bag, np.int32)
    return column


ROWS_OF_INDICES = {
    "lists": BAGS,
    "tuples": tuple(map(tuple, BAGS)),
    "arrays": [np.array(bag, np.int16) for bag in BAGS],
    "object array": column_of(BAGS),
    "one column": column_of(BAGS)[:, None],
}


def test_an_object_array_of_rows_that_happen_to_be_equally_long_is_bags(same_bits):
    model = EmbeddingBagTransformer(TABLE, input="indices")
    for bags in ([[3, 1], [0, 5]], [[3], [199]], [[3]]):
        same_bits(model.transform(np.array(bags, dtype=object)), by_bags(bags))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("kind", ROWS_OF_INDICES)
def test_rows_of_indices_are_bags(kind, mode, same_bits):
    model = EmbeddingBagTransformer(TABLE, input="indices", mode=mode)
    same_bits(model.fit_transform(ROWS_OF_INDICES[kind]), by_bags(mode=mode))


def test_rows_of_a_2_d_array_are_bags_of_any_width(rng, same_bits):
    model = EmbeddingBagTransformer(TABLE, input="indices", padding_idx=0).fit(None)
    for width in (5, 0, 3):
        X = rng.integers(0, ROWS, (7, width)).astype(np.int32)
        same_bits(model.transform(X), qembag.embedding_bag(TABLE, X, padding_idx=0))
    assert model.transform([]).shape == (0, DIM)


@pytest.mark.parametrize(
    ("X", "kind", "message"),
    [
        ([[1.5, 2]], TypeError, r"^X: indices must be an array of integers, got a float64 array"),
        (np.array([[1.0]]), TypeError, r"^X: indices must be an array of integers, got a float64 array"),
        ([3, 4], TypeError, r"^X must have a sequence of indices for each sample, got int 3 at 0$"),
        (None, TypeError, r"^X must be an array, a column or a sequence of bags of indices, got NoneType$"),
        ({"a": [1]}, TypeError, r"^X must be an array, a column or a sequence of bags of indices, got dict$"),
        ([{3: 1.0}], TypeError, r"^X must have a sequence of indices for each sample, got dict at 0$"),
        ([[[1, 2]]], ValueError, r"^X must have a sequence of indices for each sample, got sequences of sequences$"),
        ([[1], None], TypeError, r"^X must have a sequence of indices for each sample, got NoneType at 1$"),
        (["12"], TypeError, r"^X must have a sequence of indices for each sample, got str '12' at 0$"),
        ([["1", "2"]], TypeError, r"^X: indices must be an array of integers"),
        ([[1], [ROWS]], IndexError, r"^X: indices\[1\] is 200 \(bag 1\): out of range"),
        (scipy.sparse.eye(3, format="csr"), TypeError, r"^X must be indices with input='indices', got a sparse matrix"),
    ],
)  # fmt: skip
def test_what_is_no_bag_of_indices_is_an_error(X, kind, message):
    with pytest.raises(kind, match=message):
        EmbeddingBagTransformer(TABLE, input="indices").transform(X)


def test_data_frames_of_indices_are_bags(rng, same_bits):
    pandas = pytest.importorskip("pandas")
    model = EmbeddingBagTransformer(TABLE, input="indices")
    X = rng.integers(0, ROWS, (7, 3))
    same_bits(model.transform(pandas.DataFrame(X, columns=list("abc"))), qembag.embedding_bag(TABLE, X))
    lists = pandas.DataFrame({"words": BAGS, "other": 1})
    same_bits(model.transform(lists["words"]), by_bags())
    same_bits(model.transform(lists[["words"]]), by_bags())


@pytest.mark.parametrize("package", ["pyarrow", "polars", "pandas"])
def test_columns_of_lists_are_bags(package, same_bits):
    pytest.importorskip(package)
    pytest.importorskip("nanoarrow")
    if package == "polars":
        import polars

        column = polars.Series("words", BAGS)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        column = pyarrow.array(BAGS)
        if package == "pandas":
            import pandas

            column = pandas.Series(column, dtype=pandas.ArrowDtype(column.type))
    same_bits(EmbeddingBagTransformer(TABLE, input="indices").transform(column), by_bags())


# ---- In scikit-learn -------------------------------------------------------------------------------------------------


def test_a_clone_shares_the_rows_of_a_table():
    model = EmbeddingBagTransformer(TABLE, mode="mean", num_threads=1)
    again = clone(model)
    assert again.table is not model.table
    assert np.shares_memory(again.table.data, TABLE.data)
    assert {**again.get_params(), "table": None} == {**model.get_params(), "table": None}
    assert not np.shares_memory(clone(EmbeddingBagTransformer(WEIGHTS)).table, WEIGHTS)


def test_pickles_of_a_mapped_table_name_its_file(tmp_path, same_bits):
    qembag.quantize(WEIGHTS, 4).save(tmp_path / "table.safetensors")
    model = EmbeddingBagTransformer(qembag.open_table(tmp_path / "table.safetensors"))
    pickled = pickle.dumps(model)
    assert len(pickled) < 2000
    same_bits(pickle.loads(pickled).transform(np.eye(ROWS)), model.transform(np.eye(ROWS)))
    same_bits(clone(model).transform(np.eye(ROWS)), model.transform(np.eye(ROWS)))


@pytest.mark.parametrize("vectorizer", [CountVectorizer(), TfidfVectorizer(), HashingVectorizer(n_features=ROWS)])
def test_it_follows_any_vectorizer(vectorizer):
    X = vectorizer.fit_transform(TEXTS)
    table = qembag.FloatTable(WEIGHTS[: X.shape[1]])
    found = make_pipeline(vectorizer, EmbeddingBagTransformer(table)).fit_transform(TEXTS)
    np.testing.assert_allclose(found, X @ table.data, rtol=1e-5, atol=1e-5)


def test_it_is_searched_and_fitted_in_a_pipeline():
    model = make_pipeline(CountVectorizer(), EmbeddingBagTransformer(TABLE), LogisticRegression())
    y = [0, 1, 0, 1, 0, 1]
    grid = {
        "embeddingbagtransformer__table": list(TABLES.values()),
        "embeddingbagtransformer__mode": ["sum", "average"],
    }
    search = GridSearchCV(model, grid, cv=2, error_score="raise").fit(TEXTS, y)
    assert search.predict(TEXTS).shape == (6,)
    assert len(search.cv_results_["params"]) == 2 * len(TABLES)


def test_it_stands_in_for_the_components_of_a_dense_projection(rng):
    from sklearn.decomposition import TruncatedSVD

    X = scipy.sparse.csr_array(abs(features(rng, 60, 40)))
    svd = TruncatedSVD(5, random_state=0).fit(X)
    table = qembag.quantize(svd.components_.T.astype(np.float32), 8)
    found = EmbeddingBagTransformer(table).fit_transform(X)
    assert np.abs(found - svd.transform(X)).max() < 0.02 * np.abs(svd.transform(X)).max()


def test_outputs_have_names():
    names = [f"embeddingbagtransformer{number}" for number in range(DIM)]
    model = EmbeddingBagTransformer(TABLE).fit(np.ones((2, 3)))
    assert list(model.get_feature_names_out()) == names
    assert list(EmbeddingBagTransformer(TABLE, input="indices").get_feature_names_out()) == names
    assert model.n_features_in_ == 3
    with pytest.raises(ValueError, match="3 features"):
        model.transform(np.ones((2, 4)))


@pytest.mark.parametrize("package", ["pandas", "polars"])
def test_outputs_become_data_frames(package, same_bits):
    frames = pytest.importorskip(package)
    X = frames.DataFrame({"first": [1.0, 0.0], "second": [0.5, 0.0]})
    model = EmbeddingBagTransformer(TABLE).set_output(transform=package).fit(X)
    found = model.transform(X)
    assert type(found) is frames.DataFrame
    assert list(found.columns) == list(model.get_feature_names_out())
    same_bits(np.asarray(found), EmbeddingBagTransformer(TABLE).transform([[1, 0.5], [0, 0]]))


def test_columns_of_a_data_frame_have_transformers_of_their_own(same_bits):
    pandas = pytest.importorskip("pandas")
    X = pandas.DataFrame({"first": [1.0, 0.0], "second": [0.5, 0.0], "words": [[1], [2, 3]]})
    both = ColumnTransformer(
        [
            ("dense", EmbeddingBagTransformer(TABLE), ["first", "second"]),
            ("column", EmbeddingBagTransformer(TABLE, input="indices"), "words"),
            ("frame", EmbeddingBagTransformer(TABLE, input="indices"), ["words"]),
        ]
    ).set_output(transform="pandas")
    found = both.fit_transform(X)
    assert found.columns[0] == "dense__embeddingbagtransformer0"
    assert list(both.named_transformers_["dense"].feature_names_in_) == ["first", "second"]
    same_bits(found.to_numpy()[:, :DIM].copy(), EmbeddingBagTransformer(TABLE).transform([[1, 0.5], [0, 0]]))
    same_bits(found.to_numpy()[:, DIM : 2 * DIM].copy(), by_bags([[1], [2, 3]]))
    same_bits(found.to_numpy()[:, 2 * DIM :].copy(), by_bags([[1], [2, 3]]))


@pytest.mark.slow
def test_it_works_in_processes(rng, same_bits):
    X = features(rng)
    union = FeatureUnion(
        [("a", EmbeddingBagTransformer(TABLE)), ("b", EmbeddingBagTransformer(TABLES["4 bits"]))], n_jobs=2
    )
    expected = np.hstack([EmbeddingBagTransformer(TABLES[name]).transform(X) for name in ("8 bits", "4 bits")])
    same_bits(union.fit_transform(X), expected)


def test_without_scikit_learn_the_error_says_what_to_install():
    code = "import sys; sys.modules['sklearn'] = None\ntry: import qembag.sklearn\nexcept ImportError as e: print(e)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == "qembag.sklearn needs scikit-learn: pip install 'qembag[sklearn]'\n"
