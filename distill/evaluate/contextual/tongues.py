"""Requests in German, French, Spanish and Italian: numbers and days are written as there, arguments as in JSON."""

from __future__ import annotations

import datetime

from distill.evaluate.contextual.requests import ORDER_STATES, PARCEL_STATES, Maker
from distill.evaluate.contextual.scene import Made, Scene, Task, maybe, near, on

TONGUES = ("de", "fr", "es", "it")
_STATES = {
    "paid": ("bezahlt", "payée", "pagado", "pagato"), "packed": ("verpackt", "emballée", "empaquetado", "imballato"),
    "shipped": ("versandt", "expédiée", "enviado", "spedito"),
    "delivered": ("zugestellt", "livré", "entregado", "consegnato"),
    "returned": ("zurückgeschickt", "retournée", "devuelto", "restituito"),
    "in transit": ("unterwegs", "en transit", "en tránsito", "in transito"),
    "out for delivery": ("in Zustellung", "en cours de livraison", "en reparto", "in consegna"),
    "held at customs": ("beim Zoll festgehalten",
                        "retenu à la douane", "retenido en la aduana", "trattenuto in dogana"),
}  # fmt: skip
_MORE = {"delivered": ("geliefert", "livrée", "entregada", "recapitato")}
_MONEY = {"EUR": ("Euro", "euros", "euros", "euro"),
          "GBP": ("Pfund", "livres sterling", "libras esterlinas", "sterline"),
          "CHF": ("Franken", "francs suisses", "francos suizos", "franchi svizzeri"),
          "SEK": ("schwedische Kronen", "couronnes suédoises", "coronas suecas", "corone svedesi"),
          "CAD": ("kanadische Dollar", "dollars canadiens", "dólares canadienses", "dollari canadesi")}  # fmt: skip

_WEATHER = {
    "de": ("Wie warm wird es am {day} in {city}, in Grad Celsius, und wie stark ist der Wind in km/h?",
           "In {city} werden es am {day} {warm} Grad Celsius, bei {wind} km/h Wind."),
    "fr": ("Quelle température (en degrés Celsius) et quel vent (en km/h) sont prévus à {city} le {day} ?",
           "À {city}, le {day}, il fera {warm} degrés Celsius avec un vent de {wind} km/h."),
    "es": ("¿Qué temperatura en grados Celsius y qué viento en km/h se esperan en {city} el {day}?",
           "En {city}, el {day}, habrá {warm} grados Celsius y un viento de {wind} km/h."),
    "it": ("Che temperatura in gradi Celsius e che vento in km/h sono previsti a {city} il {day}?",
           "A {city}, il {day}, ci saranno {warm} gradi Celsius e un vento di {wind} km/h."),
}  # fmt: skip
_EXCHANGE = {
    "de": ("Rechne mir bitte {amount} {source} in {target} um; welcher Kurs gilt dabei?",
           "{amount} {source} sind {money} {target}, zum Kurs von {rate}."),
    "fr": ("Combien font {amount} {source} en {target}, et à quel taux ?",
           "{amount} {source} font {money} {target}, au taux de {rate}."),
    "es": ("¿Cuánto son {amount} {source} en {target} y a qué tipo de cambio?",
           "{amount} {source} son {money} {target}, con un tipo de cambio de {rate}."),
    "it": ("Quanto fanno {amount} {source} in {target}, e a quale cambio?",
           "{amount} {source} fanno {money} {target}, al cambio di {rate}."),
}  # fmt: skip
_ORDER = {
    "de": ("Wann wurde die Bestellung {number} aufgegeben, wie hoch ist ihr Betrag und in welchem Zustand ist sie?",
           "Die Bestellung {number} wurde am {day} aufgegeben; der Betrag ist {total}, ihr Zustand: {state}."),
    "fr": ("De quel jour date la commande {number}, quel est son montant et quel est son état ?",
           "La commande {number} date du {day} ; son montant est de {total} et son état : {state}."),
    "es": ("¿De qué día es el pedido {number}, cuál es su importe y en qué estado está?",
           "El pedido {number} es del {day}; su importe es {total} y su estado: {state}."),
    "it": ("Di che giorno è l'ordine {number}, qual è il suo importo e in che stato è?",
           "L'ordine {number} è del {day}; il suo importo è {total} e il suo stato: {state}."),
}  # fmt: skip
_PARCEL = {
    "de": ("Wo ist die Sendung {number}, wie ist ihr Status und an welchem Tag wird sie erwartet?",
           "Die Sendung {number} ist in {place}, ihr Status: {state}. Sie wird am {day} erwartet."),
    "fr": ("Où se trouve le colis {number}, quel est son statut et quel jour est-il attendu ?",
           "Le colis {number} se trouve à {place}, statut : {state}. Il est attendu le {day}."),
    "es": ("¿Dónde está el envío {number}, cuál es su estado y qué día se espera?",
           "El envío {number} está en {place}, estado: {state}. Se espera el {day}."),
    "it": ("Dov'è la spedizione {number}, qual è il suo stato e che giorno è attesa?",
           "La spedizione {number} è a {place}, stato: {state}. È attesa il {day}."),
}  # fmt: skip
_BALANCE = {
    "de": ("Welches Guthaben in Euro hat das Kundenkonto {number}?",
           "Das Kundenkonto {number} hat {balance} Euro Guthaben."),
    "fr": ("Quel est le solde en euros du compte client {number} ?",
           "Le solde du compte {number} est de {balance} euros."),
    "es": ("¿Qué saldo en euros tiene la cuenta de cliente {number}?",
           "La cuenta {number} tiene un saldo de {balance} euros."),
    "it": ("Che saldo in euro ha il conto cliente {number}?", "Il conto {number} ha un saldo di {balance} euro."),
}  # fmt: skip
_SHIPPING = {
    "de": ("Was kostet ein Paket von {weight} Kilogramm von {start} nach {end} mit dem Dienst \"express\", in Euro?",
           "Das Paket von {start} nach {end} kostet {price} Euro."),
    "fr": ("Combien coûte en euros un colis de {weight} kilogrammes de {start} à {end}, service « express » ?",
           "Le colis de {start} à {end} coûte {price} euros."),
    "es": ("¿Cuánto cuesta en euros un paquete de {weight} kilogramos de {start} a {end} con el servicio \"express\"?",
           "El paquete de {start} a {end} cuesta {price} euros."),
    "it": ("Quanto costa in euro un pacco di {weight} chilogrammi da {start} a {end} con il servizio \"express\"?",
           "Il pacco da {start} a {end} costa {price} euro."),
}  # fmt: skip


def weather(s: Scene) -> Task:
    city, day = s.pick("city"), s.today + datetime.timedelta(days=s.draw.between(1, 9))
    made = s.call("get_weather", {"city": city, "date": on(str(day)), "units": "celsius"},
                  wanted=lambda r: r["wind_kmh"] > 9 and r["temperature"] > 0)  # fmt: skip
    warm, wind = s.fact(made, "/temperature", "number"), s.fact(made, "/wind_kmh", "number")
    return _task(s, _WEATHER, city=city, day=s.said(day), warm=warm, wind=wind)


def exchange(s: Scene) -> Task:
    source, target = s.draw.sample(tuple(_MONEY), 2)
    amount = s.draw.between(110_000, 980_000) / 100
    arguments = {"amount": near(amount), "from": source, "to": target, "date": maybe(str(s.today))}
    made = s.call("convert_currency", arguments)
    money, rate = s.fact(made, "/amount", "number"), s.fact(made, "/rate", "number")
    names = {role: _MONEY[code][TONGUES.index(s.locale)] for role, code in (("source", source), ("target", target))}
    return _task(s, _EXCHANGE, amount=s.said(amount), money=money, rate=rate, **names)


def order(s: Scene) -> Task:
    number = s.code("ORD-999999")
    made = s.call("get_order", {"order_id": number, "include_items": maybe(False)}, {"placed": str(s.past())})
    state, total = _state(s, made, ORDER_STATES), s.fact(made, "/total", "number")
    return _task(s, _ORDER, number=number, state=state, total=total, day=s.fact(made, "/placed", "date"))


def parcel(s: Scene) -> Task:
    number = s.code("AA999999999")
    made = s.call(
        "track_shipment", {"tracking_number": number}, {"location": s.pick("city"), "expected": str(s.day(9))}
    )
    state, place = _state(s, made, PARCEL_STATES), s.fact(made, "/location", "string")
    return _task(s, _PARCEL, number=number, place=place, state=state, day=s.fact(made, "/expected", "date"))


def balance(s: Scene) -> Task:
    number, person = s.code("C-99999"), s.pick("person")
    made = s.call("get_customer", {"customer_id": number, "fields": maybe(["balance"])},
                  {"contact": {"name": person, "email": s.mail(person)}, "remarks": [],
                   "balance_eur": s.draw.between(110_000, 890_000) / 100})  # fmt: skip
    return _task(s, _BALANCE, number=number, balance=s.fact(made, "/balance_eur", "number"))


def shipping(s: Scene) -> Task:
    start, end, weight = s.code("99999"), s.code("99999"), s.draw.between(11, 290) / 10
    made = s.call("estimate_shipping", {"from_zip": start, "to_zip": end, "parcels": [{"weight_kg": weight}],
                                        "service": "express"})  # fmt: skip
    said = s.fact(made, "/price_eur", "number")
    return _task(s, _SHIPPING, start=start, end=end, weight=s.said(weight), price=said)


def _task(s: Scene, forms: dict[str, tuple[str, str]], **values: str) -> Task:
    request, answer = forms[s.locale]
    return Task(request.format(**values), answer.format(**values))


def _state(s: Scene, made: Made, states: tuple[str, ...]) -> str:
    """A status in the scene's language, and the others as decoys."""
    tongue = TONGUES.index(s.locale)
    value = made.result["status"]
    forms = [_STATES[value][tongue], *(words[tongue] for words in [_MORE.get(value)] if words)]
    s.decoys += [_STATES[state][tongue] for state in states if state != value]
    return s.fact(made, "/status", "string", *forms)


ABROAD: tuple[Maker, ...] = (weather, exchange, order, parcel, balance, shipping)
