"""What the scenarios are about. No city, person, subject or identifier here stands in the material of training prompts.

A test holds these words against distill/data/prompts/tool_requests.py.
"""

from __future__ import annotations

WORDS: dict[str, tuple[str, ...]] = {
    "city": ("Ljubljana", "Pécs", "Tromsø", "Valparaíso", "Mombasa", "Hobart", "Bologna", "Cádiz", "Antwerp", "Aarhus",
             "Galway", "Kraków", "Plovdiv", "Izmir", "Fukuoka", "Da Nang", "Cuenca", "Halifax", "Tartu", "Trieste",
             "Coimbra", "Freiburg", "Basel", "Limerick", "Varna", "Heraklion", "Nantes", "Salvador", "Windhoek",
             "Dunedin", "Penang", "Arequipa"),
    "person": ("Anselm Brandt", "Beatrix Novak", "Cosmin Albu", "Dagny Solheim", "Emre Yildiz", "Fiona Gallagher",
               "Gustavo Pires", "Henrike Voss", "Imani Njoroge", "Jarek Wolski", "Katalin Szabo", "Lorenzo Bassi",
               "Maeve Kinsella", "Nuno Tavares", "Oksana Hrytsenko", "Per Lindqvist", "Quirin Maier", "Ronja Falk",
               "Soraya Haddad", "Tibor Kovacs", "Ulrika Sand", "Viggo Holm", "Wanda Krol", "Xenia Pappas"),
    "restaurant": ("Salt Cellar", "Orchard Table", "Le Petit Four", "Golden Carp", "Vine and Ember", "The Copper Ladle",
                   "Osteria Lume", "Juniper Room", "North Quay Grill", "Casa Azafrán"),
    "landmark": ("the botanical garden", "the old observatory", "Windmill Lane 9", "the ferry terminal", "Castle Gate",
                 "the trade fair", "Juniper Square", "the planetarium", "Weaver Street 41", "the rowing club",
                 "the maritime archive", "Poplar Avenue 118"),
    "topic": ("seagrass meadows", "lighthouse restoration", "peat bog carbon", "tidal turbines", "beekeeping permits",
              "letterpress printing", "cargo sailing ships", "hydrogen ferries", "glacier tourism",
              "mycelium packaging", "dry stone walls", "urban falconry", "night trains", "seed libraries"),
    "folder": ("surveys/2028", "ledger/exports", "blueprints", "podcast/raw", "thesis/figures", "fieldwork",
               "grants/drafts", "telemetry/daily", "recipes/archive", "choir/scores"),
    "stem": ("harvest", "inventory", "soundings", "roster", "calibration", "ledgers", "catalogue", "tariffs",
             "moorings", "catering", "wiring", "permits"),
    "settings": tuple(f"{folder}/{name}.{ending}" for folder in ("deploy", "etc", "conf", "ops")
                      for name in ("orchard", "harbour", "greenhouse", "mill", "kiln", "turbine", "aviary", "cellar")
                      for ending in ("toml", "ini")),
    "key": ("max_depth", "flow_limit", "pool_size", "batch_window", "cache_ttl", "queue_length", "scan_interval",
            "backlog_cap"),
    "subject": ("Mooring fees for the spring", "Keys for the boathouse", "Repairs to the organ", "Choir tour in autumn",
                "Sample jars for the lab", "Fence along the orchard", "Loan of the projector", "Seats on the coach",
                "Wood for the kiln", "Beehives behind the barn", "Insurance of the van", "Lease of the studio"),
    "appointment": ("Fire drill", "Orchard tour", "Quartet rehearsal", "Kiln inspection", "Board lunch", "Eye test",
                    "Boat survey", "Thesis defence", "Press briefing", "Flu jab", "Roof inspection", "Tasting panel"),
    "note": ("the cabin", "the boathouse", "the allotment", "the studio", "the van", "the guest flat", "the greenhouse",
             "the workshop", "the rehearsal room", "the sailing club"),
    "chore": ("descale the kettle", "bleed the radiators", "prune the quince", "varnish the oars", "feed the starter",
              "rotate the tyres", "empty the dehumidifier", "back up the recorder", "oil the cello pegs",
              "repot the lemon tree", "sign the lease", "rinse the rain barrel"),
    "album": ("Salt and Static", "Harvest Engine", "Letters from Skagen", "The Amber Hours", "Low Tide Radio",
              "Winter Orchard"),
    "repository": ("tide-gauge", "orchard-api", "kiln-firmware", "ferry-planner", "choir-portal", "seed-ledger",
                   "mooring-map"),
    "identifier": ("spill_guard", "FerryTimetable", "drain_queue", "kiln_profile", "resolve_berth", "SeedBatch",
                   "tide_offset", "merge_ledgers", "hull_checksum", "quorum_of"),
    "project": ("KILN", "FERRY", "ORCH", "MOOR", "CHOIR", "SEED"),
    "defect": ("berth map shows winter depths", "kiln curve jumps at 900 degrees", "ferry times ignore holidays",
               "seed labels print upside down", "tenor parts miss page four", "mooring fee counts leap days",
               "export drops the last berth", "humidity alarm repeats forever", "login mail lands in the archive"),
    "symbol": ("NESN", "NOVN", "ASML", "ULVR", "RIO", "BHP", "KO", "PEP", "CRM", "UBER", "ABNB", "HEIA", "VOW", "ENEL"),
    "airport": ("BGO", "LJU", "TLL", "KRK", "BIO", "GOT", "HEL", "NCE", "PMO", "RIX", "SNN", "TRS", "VLC", "BRI"),
    "service": ("berth-booking", "kiln-gateway", "tide-feed", "choir-mailer", "seed-index", "ferry-quotes"),
    "station": ("Port Ellis", "Skarvik", "Marazion", "Saint-Brieuc", "Oban Head", "Ribadeo", "Cuxhaven", "Lerwick"),
    "place": ("Fern and Flask", "Quayside Nook", "The Paper Kite", "Marigold", "Stone Steps", "Three Herons",
              "Bright Anchor", "Elm Court", "Grey Thistle", "Old Tannery"),
    "host": ("tides.example.org", "berths.example.net", "kiln.example.org", "choir.example.net", "seeds.example.org"),
    "page": ("opening", "fees", "timetable", "contact", "rules", "notices"),
    "heard": ("the tenor section", "the orchard crew", "the harbour office", "the print shop", "the night shift"),
}  # fmt: skip

FILLER_SUBJECTS = ("The north jetty", "The cider press", "The second kiln", "The seed vault", "The ferry ramp",
                   "The rehearsal piano", "The rain gauge", "The tool shed", "The east greenhouse", "The slipway",
                   "The archive room", "The drying loft", "The beehive by the wall", "The ticket booth")  # fmt: skip
FILLER_VERBS = ("was repainted", "stayed closed", "was inspected", "needs new hinges", "was lent out", "was swept",
                "has a new lock", "was measured again", "is waiting for parts", "was moved indoors",
                "was photographed", "has been insured", "was left unlocked", "is to be shared")  # fmt: skip
FILLER_TAILS = ("after the storm", "before the fair", "with the help of two volunteers", "as agreed last season",
                "although nobody had asked", "because of the damp", "until the parts arrive", "at the usual rate",
                "in spite of the frost", "for the visiting school", "while the crew was away",
                "on the advice of the surveyor")  # fmt: skip
